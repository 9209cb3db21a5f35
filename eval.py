"""Evaluate: a run, a model or an endpoint -> completions, verdicts; installed as `dcr-eval`.

python eval.py run=outputs/<folder> tasks=[over_refusal,safety,ability]
python eval.py run=outputs/<folder> tasks=[discernment]
python eval.py run=outputs/<folder> calibrate=0.9
python eval.py model=smollm2_135m data=paper data.root=<data> limit=100
python eval.py endpoint=http://127.0.0.1:8000/v1 endpoint_model=<name> tasks=[over_refusal]
"""

from dcr import commands

if __name__ == "__main__":
    commands.evaluate()
