"""The paper's analyses of a model's weights: refusal probability, kernel, separability, claims."""
