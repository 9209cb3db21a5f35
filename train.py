"""Train: config -> stages -> run folder; the installed command is `dcr-train`.

python train.py model=llama3_8b stage=contrastive
python train.py -m dcr.epochs=1,2,3,5
"""

from dcr import commands

if __name__ == "__main__":
    commands.train()
