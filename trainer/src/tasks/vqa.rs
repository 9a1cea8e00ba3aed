//! Visual question answering: VQA v2's files, its normalisation of answers, and its accuracy.
//!
//! The normalisation is that of the official evaluation (visualqa.org), by whose rules published figures are made, with its quirks;
//! `reference/vqa_eval.py` makes the tests' values with an independent implementation.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{Label, RawExample};

#[derive(Deserialize)]
struct Questions {
    questions: Vec<Question>,
}

#[derive(Deserialize)]
struct Question {
    question_id: u64,
    image_id: u64,
    question: String,
}

#[derive(Deserialize)]
struct Annotations {
    annotations: Vec<Annotation>,
}

#[derive(Deserialize)]
struct Annotation {
    question_id: u64,
    answers: Vec<Answer>,
}

#[derive(Deserialize)]
struct Answer {
    answer: String,
}

/// Reads a question file and, where the answers are known, the annotation file that belongs to it.
///
/// # Errors
/// Files that are not of VQA v2's form, a question without its annotation.
pub fn read(questions: &Path, annotations: Option<&Path>) -> Result<Vec<RawExample>> {
    let asked: Questions = json(questions)?;
    let mut answers: HashMap<u64, Vec<String>> = HashMap::new();
    if let Some(path) = annotations {
        let known: Annotations = json(path)?;
        answers.extend(known.annotations.into_iter().map(|a| (a.question_id, a.answers.into_iter().map(|a| a.answer).collect())));
    }
    let example = |question: Question| {
        let label = match annotations {
            None => None,
            Some(path) => match answers.remove(&question.question_id) {
                Some(given) => Some(Label::Answers(given)),
                None => bail!("{} has no answers to question {}", path.display(), question.question_id),
            },
        };
        Ok(RawExample {
            id: question.question_id.to_string(),
            image: Some(question.image_id.to_string()),
            texts: vec![question.question],
            label,
        })
    };
    asked.questions.into_iter().map(example).collect()
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("in {}", path.display()))
}

/// Accuracy of an answer against those that people gave: the mean, over each of them left out in turn, of min(matches among the
/// others / 3, 1). Where people differ, all answers are normalised first.
#[must_use]
pub fn accuracy(answer: &str, given: &[String]) -> f64 {
    let plain = |text: &str| text.replace(['\n', '\t'], " ").trim().to_owned();
    let given: Vec<String> = given.iter().map(|g| plain(g)).collect();
    let differ = given.windows(2).any(|two| two[0] != two[1]);
    let form = |text: &str| if differ { normalise_answer(text) } else { text.to_owned() };
    let answer = form(&plain(answer));
    let matches: Vec<bool> = given.iter().map(|g| form(g) == answer).collect();
    let all = matches.iter().filter(|&&m| m).count();
    let of_others = |&own: &bool| ((all - usize::from(own)) as f64 / 3.0).min(1.0);
    matches.iter().map(of_others).sum::<f64>() / matches.len().max(1) as f64
}

/// Punctuation that the evaluation takes out; the period is treated apart.
const PUNCTUATION: [char; 21] =
    [';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',', '?', '!'];

const NUMBERS: [(&str, &str); 12] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];

/// Contractions that are put right when one of their apostrophes is missing.
const CONTRACTIONS: &str = "'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't \
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't \
    not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd \
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd \
    they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've \
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd \
    you'd've you'll you're you've";

/// An answer as the official evaluation compares it: punctuation taken out, lower case, number words as digits, no articles,
/// apostrophes put right.
#[must_use]
pub fn normalise_answer(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let between_digits =
        |i: usize| i > 0 && characters[i - 1].is_ascii_digit() && characters.get(i + 1).is_some_and(char::is_ascii_digit);
    let number_with_comma = (0..characters.len()).any(|i| characters[i] == ',' && between_digits(i));
    let mut bare = text.to_owned();
    for mark in PUNCTUATION {
        let at_a_space = text.contains(&format!("{mark} ")) || text.contains(&format!(" {mark}"));
        bare = bare.replace(mark, if at_a_space || number_with_comma { "" } else { " " });
    }
    let characters: Vec<char> = bare.chars().collect();
    let kept = |&i: &usize| characters[i] != '.' || characters.get(i + 1).is_some_and(char::is_ascii_digit);
    let bare: String = (0..characters.len()).filter(kept).map(|i| characters[i]).collect();
    let number =
        |word: &str| NUMBERS.iter().find(|(name, _)| *name == word).map_or(word.to_owned(), |(_, digits)| (*digits).to_owned());
    let lower = bare.to_lowercase();
    let words = lower.split_whitespace().map(number).filter(|word| !["a", "an", "the"].contains(&word.as_str()));
    words.map(|word| with_apostrophe(&word)).collect::<Vec<_>>().join(" ")
}

/// A contraction that lacks one of its apostrophes, put right; any other word as it is.
fn with_apostrophe(word: &str) -> String {
    if word == "somebody'd" {
        // A slip of the official table, kept.
        return "somebodyd".to_owned();
    }
    let lacks_one = |form: &&str| {
        form.len() == word.len() + 1
            && form
                .match_indices('\'')
                .any(|(at, _)| word.is_char_boundary(at) && form[..at] == word[..at] && form[at + 1..] == word[at..])
    };
    CONTRACTIONS.split_whitespace().find(lacks_one).unwrap_or(word).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        answers: Vec<(String, String)>,
        accuracies: Vec<(String, Vec<String>, f64)>,
    }

    #[test]
    fn answers_and_accuracies_agree_with_an_independent_implementation() {
        let golden: Golden = serde_json::from_str(include_str!("reference/vqa_golden.json")).unwrap();
        assert!(golden.answers.len() > 150 && golden.accuracies.len() > 8);
        for (text, expected) in golden.answers {
            assert_eq!(normalise_answer(&text), expected, "{text:?}");
        }
        for (answer, given, expected) in golden.accuracies {
            let got = accuracy(&answer, &given);
            assert!((got - expected).abs() < 1e-9, "{answer:?} of {given:?}: {got}, not {expected}");
        }
    }
}
