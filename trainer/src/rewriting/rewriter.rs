//! Negatives made from scene graphs: a caption with one node, or one whole phrase, replaced by another of its type, so that it
//! no longer fits the picture.
//!
//! What may stand in a replacement's place is decided by the corpus itself. Five people who describe one picture use different
//! words for one thing; so a word that turns up in siblings of captions that hold the replaced word more often than chance
//! would have it may well be true of the picture, and is never used. Words of the picture's own captions never are.

use std::collections::{BTreeMap, HashMap, HashSet};

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::graph::SceneGraph;
use super::tagging::Tag;
use super::vocabulary::{Class, LEAST_PICTURES, Node, Vocabulary, nodes, stem};
use crate::seed;
use crate::tfidf::TfIdfIndex;

/// Draws for one negative before it is given up.
const DRAWS: usize = 30;

/// A noun phrase of the corpus, without its determiner.
struct Phrase {
    head: u32,
    text: String,
    stems: Vec<String>,
}

/// How many of each kind to make for a caption.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
pub struct Counts {
    /// One word replaced.
    pub word: usize,
    /// One noun phrase, or two words, replaced.
    pub phrase: usize,
    /// Captions of other pictures that read most alike.
    pub sentence: usize,
}

/// Negatives of one caption.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Negatives {
    /// One word replaced.
    pub word: Vec<String>,
    /// One noun phrase, or two words, replaced.
    pub phrase: Vec<String>,
    /// Captions of other pictures that read most alike.
    pub sentence: Vec<String>,
}

/// Makes negatives for the captions of one corpus.
pub struct Rewriter<'a> {
    captions: &'a [Vec<String>],
    graphs: Vec<Vec<SceneGraph>>,
    vocabulary: Vocabulary,
    phrases: Vec<Phrase>,
    by_head: BTreeMap<Class, Vec<usize>>,
    alike: TfIdfIndex,
    first_text: Vec<usize>,
}

impl<'a> Rewriter<'a> {
    /// Parses all captions and learns what they say of one picture; `captions` holds those of each picture.
    #[must_use]
    pub fn new(captions: &'a [Vec<String>]) -> Self {
        let graphs: Vec<Vec<SceneGraph>> =
            captions.par_iter().map(|own| own.iter().map(|caption| SceneGraph::of(caption)).collect()).collect();
        let mut vocabulary = Vocabulary::default();
        for picture in &graphs {
            vocabulary.add(picture);
        }
        vocabulary.finish();
        let (mut phrases, mut seen) = (Vec::new(), HashSet::new());
        let mut by_head: BTreeMap<Class, Vec<usize>> = BTreeMap::new();
        for (own, captions) in graphs.iter().zip(captions) {
            for (graph, caption) in own.iter().zip(captions) {
                for object in graph.objects.iter().filter(|o| !o.attributes.is_empty()) {
                    if let Some(phrase) = phrase(graph, object, caption, &vocabulary).filter(|p| seen.insert(p.text.clone())) {
                        by_head.entry(vocabulary.words[phrase.head as usize].0).or_default().push(phrases.len());
                        phrases.push(phrase);
                    }
                }
            }
        }
        let mut numbers: HashMap<&str, u32> = HashMap::new();
        let texts: Vec<Vec<u32>> = graphs
            .iter()
            .flatten()
            .map(|graph| {
                let words = graph.words.iter().filter(|w| w.tag != Tag::Break);
                words
                    .map(|w| {
                        let next = numbers.len() as u32;
                        *numbers.entry(&w.text).or_insert(next)
                    })
                    .collect()
            })
            .collect();
        let slices: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let picture_of = captions.iter().enumerate().flat_map(|(i, own)| vec![i as u32; own.len()]).collect();
        let alike = TfIdfIndex::new(&slices, picture_of);
        let first_text = captions
            .iter()
            .scan(0, |next, own| {
                *next += own.len();
                Some(*next - own.len())
            })
            .collect();
        drop(numbers);
        Self { captions, graphs, vocabulary, phrases, by_head, alike, first_text }
    }

    /// Negatives of caption `caption` of picture `picture`; fewer than asked for where the caption offers no more. The same
    /// seed gives the same ones.
    #[must_use]
    pub fn negatives(&self, picture: usize, caption: usize, counts: Counts, seed_value: u64) -> Negatives {
        let text = self.first_text[picture] + caption;
        let mut rng = seed::rng(seed::mix(seed_value, text as u64));
        let own: HashSet<String> = self.graphs[picture].iter().flat_map(|g| g.words.iter().map(|w| stem(&w.text))).collect();
        let written = &self.captions[picture][caption];
        let distinct = |count: usize, make: &mut dyn FnMut() -> Option<String>| {
            let mut made: Vec<String> = Vec::new();
            for _ in 0..count * 3 {
                if made.len() < count
                    && let Some(text) = make()
                    && !made.contains(&text)
                    && text != *written
                {
                    made.push(text);
                }
            }
            made
        };
        let graph = &self.graphs[picture][caption];
        let word = distinct(counts.word, &mut || self.replace_words(graph, written, &own, 1, &mut rng));
        let phrase = distinct(counts.phrase, &mut || {
            let whole = rng.random_bool(0.5).then(|| self.replace_phrase(graph, written, &own, &mut rng)).flatten();
            whole.or_else(|| self.replace_words(graph, written, &own, 2, &mut rng))
        });
        let all = |text: usize| {
            let picture = self.first_text.partition_point(|&first| first <= text) - 1;
            self.captions[picture][text - self.first_text[picture]].clone()
        };
        let sentence = self.alike.hard_negatives(text, counts.sentence).into_iter().map(all).collect();
        Negatives { word, phrase, sentence }
    }

    fn replace_words(
        &self,
        graph: &SceneGraph,
        caption: &str,
        own: &HashSet<String>,
        count: usize,
        rng: &mut ChaCha8Rng,
    ) -> Option<String> {
        // One word may describe two objects, but is replaced once.
        let (mut nodes, mut seen) = (nodes(graph), HashSet::new());
        nodes.retain(|node| seen.insert(node.word));
        let chosen: Vec<&Node> = nodes.choose_multiple(rng, count).collect();
        if chosen.len() < count {
            return None;
        }
        let mut changes = Vec::with_capacity(count);
        for node in chosen {
            let word = &graph.words[node.word];
            let id = *self.vocabulary.ids.get(&(node.class, word.text.clone()))?;
            changes.push((word.span.clone(), self.other(id, own, rng)?));
        }
        Some(rewritten(caption, changes))
    }

    /// Another word of the class, by the square root of how often pictures hold it.
    fn other(&self, id: u32, own: &HashSet<String>, rng: &mut ChaCha8Rng) -> Option<String> {
        let v = &self.vocabulary;
        let class = v.classes.get(&v.words[id as usize].0)?;
        let candidates =
            (0..DRAWS).filter_map(|_| class.choose_weighted(rng, |&b| f64::from(v.pictures[b as usize]).sqrt()).ok());
        candidates.collect::<Vec<_>>().into_iter().find(|&&b| self.is_false(id, b, own)).map(|&b| v.words[b as usize].1.clone())
    }

    fn is_false(&self, id: u32, other: u32, own: &HashSet<String>) -> bool {
        id != other && self.vocabulary.lift(id, other) <= 1.0 && !own.contains(&stem(&self.vocabulary.words[other as usize].1))
    }

    fn replace_phrase(&self, graph: &SceneGraph, caption: &str, own: &HashSet<String>, rng: &mut ChaCha8Rng) -> Option<String> {
        let object = graph.objects.choose(rng)?;
        let replaced = phrase_span(graph, object)?;
        let head = nodes(graph).into_iter().find(|n| n.word == object.head)?;
        let id = *self.vocabulary.ids.get(&(head.class, graph.words[object.head].text.clone()))?;
        let fitting = self.by_head.get(&head.class)?;
        let drawn: Vec<&Phrase> = (0..DRAWS).filter_map(|_| fitting.choose(rng)).map(|&p| &self.phrases[p]).collect();
        let other = drawn.into_iter().find(|p| self.is_false(id, p.head, own) && !p.stems.iter().any(|s| own.contains(s)))?;
        Some(rewritten(caption, vec![(replaced, other.text.clone())]))
    }
}

/// Bytes of an object's phrase from its first description to its head, where these stand in one piece.
fn phrase_span(graph: &SceneGraph, object: &super::graph::Object) -> Option<std::ops::Range<usize>> {
    let first = object.attributes.iter().copied().filter(|&a| a < object.head).min().unwrap_or(object.head);
    let whole = (first..=object.head).all(|w| w == object.head || object.attributes.contains(&w));
    whole.then(|| graph.words[first].span.start..graph.words[object.head].span.end)
}

fn phrase(graph: &SceneGraph, object: &super::graph::Object, caption: &str, vocabulary: &Vocabulary) -> Option<Phrase> {
    let span = phrase_span(graph, object)?;
    let class = nodes(graph).into_iter().find(|n| n.word == object.head)?.class;
    let head = *vocabulary.ids.get(&(class, graph.words[object.head].text.clone()))?;
    if vocabulary.pictures[head as usize] < LEAST_PICTURES {
        return None;
    }
    let words = graph.words.iter().filter(|w| span.contains(&w.span.start));
    let stems = words.map(|w| stem(&w.text)).collect();
    Some(Phrase { head, text: caption[span].to_lowercase(), stems })
}

/// The caption with some spans replaced, "a" and "an" made to fit.
fn rewritten(caption: &str, mut changes: Vec<(std::ops::Range<usize>, String)>) -> String {
    changes.sort_by_key(|(span, _)| std::cmp::Reverse(span.start));
    let mut text = caption.to_owned();
    for (span, word) in changes {
        let upper = text[span.clone()].chars().next().is_some_and(char::is_uppercase);
        let mut word = word;
        if upper {
            let rest = word.split_off(word.chars().next().map_or(0, char::len_utf8));
            word = word.to_uppercase() + &rest;
        }
        let vowel = word.to_lowercase().starts_with(['a', 'e', 'i', 'o', 'u']);
        text.replace_range(span.clone(), &word);
        let before = text[..span.start].trim_end();
        let article_at = before.rfind(char::is_whitespace).map_or(0, |at| at + 1);
        let article = before[article_at..].to_owned();
        if article.eq_ignore_ascii_case("a") || article.eq_ignore_ascii_case("an") {
            let fitting = format!("{}{}", &article[..1], if vowel { "n" } else { "" });
            text.replace_range(article_at..article_at + article.len(), &fitting);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn articles_and_capitals_fit_what_replaces() {
        let change = |caption: &str, from: &str, to: &str| {
            let at = caption.find(from).unwrap();
            rewritten(caption, vec![(at..at + from.len(), to.to_owned())])
        };
        assert_eq!(change("A dog runs", "dog", "elephant"), "An elephant runs");
        assert_eq!(change("An orange ball", "orange", "red"), "A red ball");
        assert_eq!(change("Dogs on a sofa", "Dogs", "cats"), "Cats on a sofa");
        assert_eq!(change("two dogs", "two", "three"), "three dogs");
    }

    #[test]
    fn a_word_that_two_objects_share_is_replaced_once() {
        let shared = "The black dog and the brown dog appear to be playing on the beach.";
        let words = nodes(&SceneGraph::of(shared)).iter().map(|node| node.word).collect::<Vec<_>>();
        assert!(words.iter().enumerate().any(|(i, word)| words[..i].contains(word)), "the test asks nothing: {words:?}");
        let mut corpus = corpus();
        // Words that can stand for the shared one, "appear".
        for verb in ["seem", "look", "want", "need"].iter().cycle().take(16) {
            corpus.push(vec![format!("The white cat and the grey cat {verb} to be playing on the street.")]);
        }
        let last = corpus.len();
        corpus.push(vec![shared.to_owned()]);
        let rewriter = Rewriter::new(&corpus);
        let bare = |word: &str| word.trim_end_matches('.').to_lowercase();
        let known: HashSet<String> = corpus.iter().flatten().flat_map(|text| text.split(' ').map(bare)).collect();
        let mut made = 0;
        for seed in 0..60 {
            let counts = Counts { word: 0, phrase: 8, sentence: 0 };
            for text in rewriter.negatives(last, 0, counts, seed).phrase {
                made += 1;
                assert!(text.split(' ').all(|word| known.contains(&bare(word))), "{text} holds half a word");
            }
        }
        assert!(made > 100, "{made}");
    }

    /// Pictures of four kinds of scene, whose captions call one thing by two names.
    fn corpus() -> Vec<Vec<String>> {
        let mut corpus = Vec::new();
        for i in 0..40 {
            let (animal, other) = [("dog", "puppy"), ("cat", "kitten"), ("horse", "pony"), ("bird", "parrot")][i % 4];
            let colour = ["brown", "white", "black", "grey", "red"][i % 5];
            let place = ["beach", "street", "field"][i % 3];
            corpus.push(vec![
                // Every tower stands in two pictures: what makes captions of different pictures alike.
                format!("A {colour} {animal} is running on a {place} by tower{}.", i / 2),
                format!("the {colour} {other} is playing on the {place}"),
            ]);
        }
        corpus
    }

    #[test]
    fn negatives_say_what_is_not_said_of_the_picture() {
        let corpus = corpus();
        let rewriter = Rewriter::new(&corpus);
        let counts = Counts { word: 4, phrase: 4, sentence: 2 };
        for (picture, own) in corpus.iter().enumerate() {
            let negatives = rewriter.negatives(picture, 0, counts, 7);
            assert_eq!(negatives, rewriter.negatives(picture, 0, counts, 7));
            assert!(negatives.word.len() >= 3 && negatives.phrase.len() >= 3, "{negatives:?}");
            let tower = own[0].split(' ').next_back().unwrap();
            assert!(negatives.sentence[0].ends_with(tower) && !own.contains(&negatives.sentence[0]), "{negatives:?}");
            let said: HashSet<String> = own
                .iter()
                .flat_map(|text| text.to_lowercase().split(' ').map(|w| stem(w.trim_end_matches('.'))).collect::<Vec<_>>())
                .collect();
            for text in negatives.word.iter().chain(&negatives.phrase) {
                assert_ne!(text, &own[0]);
                let words: Vec<String> = text.to_lowercase().split(' ').map(|w| w.trim_end_matches('.').to_owned()).collect();
                let new: Vec<&String> = words.iter().filter(|w| !said.contains(&stem(w)) && *w != "an").collect();
                assert!(!new.is_empty(), "{text} says nothing new of {own:?}");
            }
            for text in &negatives.word {
                // One word, and perhaps the article before it.
                let changed =
                    text.split(' ').zip(own[0].split(' ')).filter(|(a, b)| a != b && !matches!(*a, "A" | "An" | "a" | "an"));
                assert_eq!(changed.count(), 1, "{text}");
                let synonym = own[1].split(' ').nth(2).unwrap();
                assert!(!text.contains(synonym), "{text} holds {synonym}, the same thing by another name");
            }
        }
    }
}
