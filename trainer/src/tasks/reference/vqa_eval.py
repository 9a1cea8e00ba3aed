"""Values for the tests of ../vqa.rs, by the VQA evaluation inside LAVIS.

pip download --no-deps salesforce-lavis==1.0.2 && unzip salesforce_lavis-*.whl 'lavis/common/vqa_tools/vqa_eval.py'
python vqa_eval.py lavis/common/vqa_tools/vqa_eval.py > vqa_golden.json
"""

import contextlib
import importlib.util
import io
import json
import sys

spec = importlib.util.spec_from_file_location("vqa_eval", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
evaluation = module.VQAEval()


def normalise(text):
    return evaluation.processDigitArticle(evaluation.processPunctuation(text))


texts = [
    "Yes", "a dog", "The  man", "an apple, a pear", "two", "None", "3,000", "1,000 people, maybe", "no.", "U.S.A.", "2.5", "3.",
    "black and white", "red/white", "red / white", "t-shirt", "t - shirt", "what?", "it's", "its", "dont know", "I don't know",
    "\"quoted\"", "(maybe)", "left-hand side", "10:30", "5:00 pm", "o clock", "wont", "somebody'd", "the the a", "", "  ", "100%",
    "she's", "shes", "yall", "couldnt've", "couldntve", "Im here", "let's", "ten cats", "tenth", "one-way", "a_b", "x@y", "[1]",
]
texts += list(evaluation.contractions)

cases = [
    ("yes", ["yes"] * 10),
    ("yes", ["yes"] * 2 + ["no"] * 8),
    ("no", ["yes"] * 2 + ["no"] * 8),
    ("yes", ["yes"] * 3 + ["no"] * 7),
    ("yes", ["yes"] * 1 + ["no"] * 9),
    ("The dog.", ["dog"] * 4 + ["cat"] * 6),
    ("two", ["2"] * 3 + ["3"] * 7),
    ("maybe", ["yes"] * 5 + ["no"] * 5),
    ("red", ["red", "blue", "red"]),
]


class Known:
    def __init__(self, qa):
        self.qa = qa

    def getQuesIds(self):
        return list(self.qa)


def accuracy(answer, given):
    # Each answer is a record of its own: the evaluation leaves one out by identity of content.
    answers = [{"answer": text, "answer_id": i} for i, text in enumerate(given)]
    truth = Known({1: {"answers": answers, "question_type": "q", "answer_type": "a"}})
    run = module.VQAEval(truth, Known({1: {"answer": answer}}), n=9)
    with contextlib.redirect_stdout(io.StringIO()):
        run.evaluate()
        run.accuracy = {}
    per_question = run.evalQA[1] / 100
    exact = [min(1, sum(o == normalise(answer) for j, o in enumerate(given) if j != i) / 3) for i in range(len(given))]
    assert abs(per_question - sum(exact) / len(exact)) < 1e-6, (per_question, exact)
    return sum(exact) / len(exact)


json.dump(
    {"answers": [[t, normalise(t)] for t in texts], "accuracies": [[a, g, accuracy(a, g)] for a, g in cases]},
    sys.stdout,
    indent=0,
)
