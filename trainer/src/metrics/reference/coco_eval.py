#!/usr/bin/env python3
"""Makes golden.json, the golden values of the metric tests, with pycocoevalcap and numpy.

    pip install pycocoevalcap numpy       # the PTB tokenizer in it needs a Java runtime
    python coco_eval.py > golden.json

The sentences are invented for this file. Scores are computed for the corpora named in CORPORA (ranges of SAMPLES), recall for
small integer vectors, whose dot products are exact and often tie.
"""
import json

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

# (candidate, references)
SAMPLES = [
    ("a brown dog runs through the grass", ["A brown dog is running through tall grass.", "The dog runs across a field .", "a dog in the grass"]),
    ("two children play on a red swing", ["Two kids are playing on a swing.", "Children swing, laughing, in a park.", "Two children on a red swing-set"]),
    ("a man's hat is blue", ["The man's hat isn't red, it's blue.", "A blue hat on a man's head", "He can't find his blue hat"]),
    ("a black-and-white cat sleeps on a sofa", ["A black-and-white cat sleeping on the sofa.", "A cat naps - curled up - on a couch.", "The two-year-old cat is asleep"]),
    ("people walk down the street", ["\"Walk!\" says the sign; people cross the street.", "Several people walk down a busy street", "A crowd on St. John's Street"]),
    ("", ["A lone tree on a hill.", "There is one tree on the hill top"]),
    ("a a a a a a", ["A boat and a bird and a bell.", "a boat near a pier"]),
    ("THE TRAIN ARRIVES AT 10:30 A.M.", ["A train arrives at 10:30 a.m.", "The 10:30 train is at the station", "Train No. 5 arrives"]),
    ("a runner wearing number 23 crosses the line", ["Runner #23 crosses the finish line.", "A man wearing the number 23 runs", "The 1st runner (number 23) wins the race!"]),
    ("a woman in a t-shirt holds an ice-cream", ["A woman wearing a t-shirt holds ice cream.", "The woman's T-shirt is white.", "A lady eats an ice-cream cone"]),
    ("two dogs fight over a ball", ["Two dogs' game with a ball", "The dogs are fighting over one ball.", "Dogs play with a ball..."]),
    ("a boy jumps into the water", ["A boy jumps into a lake.", "The boy is jumping into the water", "A boy, mid-air, above the water"]),
    ("a boy jumps into the water the water the water", ["A boy jumps into a lake.", "The boy is jumping into the water", "A boy, mid-air, above the water"]),
    ("dog", ["A dog.", "dog", "One dog sits."]),
    ("a girl rides a horse on the beach at sunset while her friends are watching her from the pier", ["A girl rides a horse.", "A girl on a horse at the beach"]),
    ("a chef doesn't look at the camera", ["A chef doesn't look up.", "The chef won't look at the camera.", "A cook isn't looking at the camera"]),
    ("a sign reads hello", ["A sign reads 'Hello'.", "The sign says \"hello\" in big letters", "A “hello” sign"]),
    ("musicians play rock 'n' roll", ["A band plays rock 'n' roll.", "Musicians playing rock'n'roll", "The band's 1990's-style show"]),
    ("a market sells fruit and vegetables", ["A market that sells fruits/vegetables.", "Fruit & vegetables cost $2.50 at the market", "50% off: fruit at a market"]),
    ("skiers go down a snowy hill", ["Three skiers go down a snowy hill.", "Skiers on a snowy slope", "People ski downhill"]),
    ("a child is cannot gonna", ["A child cannot swim.", "A child is gonna swim", "I'm sure they'll swim"]),
    ("a bus stops in front of a store", ["A bus stops in front of Mr. Lee's store.", "The bus is parked by the store", "A bus -- a big one -- near a shop"]),
    ("a  bird   sits on a branch .", ["A bird sits on a branch.", "Bird on a branch", "The bird is sitting in a tree"]),
    ("a café with tables outside", ["A café with tables outside.", "People sit outside the cafe", "Tables at a naïve little café"]),
    ("a player in a u.s. jersey kicks the ball", ["A player wearing a U.S. jersey kicks a ball.", "The U.S.A. player kicks", "A soccer player of the U.S."]),
    ("a clown holds balloons", ["A clown holds balloons!!!", "What is the clown holding? Balloons!", "A clown with many balloons"]),
    ("an o'clock tower", ["It is five o'clock on the tower.", "A clock tower at 5 o'clock", "y'all see the tower"]),
    ("a crowd of 1,000 people", ["A crowd of 1,000 people cheers.", "Some 1000 people stand in a crowd", "A crowd [of fans] cheers"]),
    ("a man & a woman from a&m", ["A man & a woman from Texas A&M.", "A couple at A&amp;M", "A man and a woman"]),
    ("a quiet street", ["An entirely different sentence altogether.", "Nothing in common here"]),
    ("words in common none", ["a b c d e f", "plan b. is here"]),
]

CORPORA = {"all": (0, 31), "ordinary": (0, 5), "with an empty candidate": (4, 7), "one image": (0, 1), "long candidates": (11, 15)}

def tokenised(sentences):
    numbered = {i: [{"caption": s}] for i, s in enumerate(sentences)}
    result = PTBTokenizer().tokenize(numbered)
    return [result[i][0] for i in range(len(sentences))]


def scores(candidates, references):
    gts = dict(enumerate(references))
    res = {i: [c] for i, c in enumerate(candidates)}
    return {
        "bleu": Bleu(4).compute_score(gts, res, verbose=0)[0],
        "rouge_l": float(Rouge().compute_score(gts, res)[0]),
        "cider": float(Cider().compute_score(gts, res)[0]),
    }


def ranks(similarity, relevant):
    """Wrong answers that score at least as high as the best right one, for each query; ties count against."""
    result = []
    for row, right in zip(similarity, relevant):
        result.append(int(np.sum(row[~right] >= row[right].max())))
    return np.array(result)


def recall_case(seed, images, texts_per_image, width):
    generator = np.random.default_rng(seed)
    v = generator.integers(-3, 4, size=(images, width))
    owner = np.repeat(np.arange(images), texts_per_image)
    generator.shuffle(owner)
    t = v[owner] + generator.integers(-2, 3, size=(len(owner), width))
    similarity = v @ t.T
    right = owner[None, :] == np.arange(images)[:, None]
    recalls = lambda r: [float(np.mean(r < k)) for k in (1, 5, 10)]
    return {
        "images": v.tolist(),
        "texts": t.tolist(),
        "image_of_text": owner.tolist(),
        "image_to_text": recalls(ranks(similarity, right)),
        "text_to_image": recalls(ranks(similarity.T, right.T)),
    }


def main():
    candidates = tokenised([c for c, _ in SAMPLES])
    flat = iter(tokenised([r for _, references in SAMPLES for r in references]))
    references = [[next(flat) for _ in refs] for _, refs in SAMPLES]
    golden = {
        "samples": [
            {"candidate": c, "references": refs, "candidate_tokens": ct, "reference_tokens": rt}
            for (c, refs), ct, rt in zip(SAMPLES, candidates, references)
        ],
        "corpora": [
            {"name": name, "from": a, "to": b, **scores(candidates[a:b], references[a:b])}
            for name, (a, b) in CORPORA.items()
        ],
        "recall": [recall_case(1, 20, 3, 6), recall_case(2, 12, 1, 2), recall_case(3, 30, 5, 16)],
    }
    print(json.dumps(golden, ensure_ascii=False).replace('{"candidate"', '\n{"candidate"').replace('{"name"', '\n{"name"').replace('{"images"', '\n{"images"'))


if __name__ == "__main__":
    main()
