//! The words of captions that can be replaced, and which of them describe the same pictures.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::graph::SceneGraph;
use super::tagging::{COLOURS, Tag, is_plural};

/// Pictures that must name a word before it replaces others: rarer ones are often mistyped or mistagged.
pub(super) const LEAST_PICTURES: u32 = 3;

/// What can stand in a node's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Class {
    Thing {
        plural: bool,
    },
    Colour,
    Number,
    Quality,
    /// A noun before a noun.
    Kind,
    Action(Form),
    Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Form {
    Ing,
    Past,
    Singular,
    Base,
}

fn form(verb: &str) -> Form {
    match verb {
        v if v.ends_with("ing") => Form::Ing,
        v if v.ends_with("ed") => Form::Past,
        v if v.ends_with('s') && !v.ends_with("ss") => Form::Singular,
        _ => Form::Base,
    }
}

/// A word without its commonest endings, so that "dog" and "dogs", "run" and "running" are one.
pub(super) fn stem(word: &str) -> String {
    const IRREGULAR: [(&str, &str); 12] = [
        ("men", "man"),
        ("women", "woman"),
        ("children", "child"),
        ("people", "person"),
        ("feet", "foot"),
        ("teeth", "tooth"),
        ("mice", "mouse"),
        ("wives", "wife"),
        ("knives", "knife"),
        ("leaves", "leaf"),
        ("ran", "run"),
        ("kids", "child"),
    ];
    if let Some((_, base)) = IRREGULAR.iter().find(|(form, _)| *form == word) {
        return (*base).to_owned();
    }
    let cut = |ending: &str| word.strip_suffix(ending).filter(|rest| rest.len() >= 3);
    let mut base = match (cut("ing"), cut("ies"), cut("ed"), cut("es"), cut("s")) {
        (Some(rest), ..) | (_, _, Some(rest), ..) => rest.to_owned(),
        (_, Some(rest), ..) => format!("{rest}y"),
        (_, _, _, Some(rest), _) => rest.to_owned(),
        (.., Some(rest)) => rest.to_owned(),
        _ => word.to_owned(),
    };
    let letters: Vec<char> = base.chars().rev().take(2).collect();
    if letters.len() == 2 && letters[0] == letters[1] && !matches!(letters[0], 'l' | 's') {
        base.pop();
    }
    base.trim_end_matches('e').to_owned()
}

/// A word of a caption that can be replaced.
pub(super) struct Node {
    pub(super) class: Class,
    pub(super) word: usize,
}

pub(super) fn nodes(graph: &SceneGraph) -> Vec<Node> {
    let mut nodes = Vec::new();
    let text = |w: usize| graph.words[w].text.as_str();
    for object in &graph.objects {
        let head = text(object.head);
        let plural = is_plural(head);
        nodes.push(Node { class: Class::Thing { plural }, word: object.head });
        for &word in &object.attributes {
            let class = match graph.words[word].tag {
                _ if COLOURS.contains(&text(word)) => Class::Colour,
                Tag::Number => Class::Number,
                Tag::Noun => Class::Kind,
                Tag::Verb => Class::Action(form(text(word))),
                _ => Class::Quality,
            };
            nodes.push(Node { class, word });
        }
    }
    let mut seen = HashSet::new();
    for relation in &graph.relations {
        let first = relation.predicate[0];
        if !seen.insert(first) || text(first) == "of" {
            continue;
        }
        match graph.words[first].tag {
            Tag::Verb => nodes.push(Node { class: Class::Action(form(text(first))), word: first }),
            Tag::Preposition if relation.predicate.len() == 1 => nodes.push(Node { class: Class::Place, word: first }),
            _ => {}
        }
    }
    nodes
}

/// How often each word of each class describes a picture, and how often two describe the same one.
#[derive(Default)]
pub(super) struct Vocabulary {
    pub(super) ids: HashMap<(Class, String), u32>,
    pub(super) words: Vec<(Class, String)>,
    pub(super) pictures: Vec<u32>,
    together: HashMap<(u32, u32), u32>,
    pub(super) classes: BTreeMap<Class, Vec<u32>>,
    total: u32,
}

impl Vocabulary {
    pub(super) fn add(&mut self, picture: &[SceneGraph]) {
        let mut here: BTreeSet<u32> = BTreeSet::new();
        for graph in picture {
            for node in nodes(graph) {
                let key = (node.class, graph.words[node.word].text.clone());
                let next = self.words.len() as u32;
                let id = *self.ids.entry(key.clone()).or_insert(next);
                if id == next {
                    self.words.push(key);
                    self.pictures.push(0);
                }
                here.insert(id);
            }
        }
        for &a in &here {
            self.pictures[a as usize] += 1;
            for &b in here.range(a + 1..) {
                if self.words[a as usize].0 == self.words[b as usize].0 {
                    *self.together.entry((a, b)).or_default() += 1;
                }
            }
        }
        self.total += 1;
    }

    pub(super) fn finish(&mut self) {
        for (id, (class, _)) in self.words.iter().enumerate() {
            if self.pictures[id] >= LEAST_PICTURES {
                self.classes.entry(*class).or_default().push(id as u32);
            }
        }
    }

    /// How many times as often two words describe one picture as they would by chance.
    pub(super) fn lift(&self, a: u32, b: u32) -> f64 {
        let together = self.together.get(&(a.min(b), a.max(b))).copied().unwrap_or(0);
        let [a, b] = [a, b].map(|id| f64::from(self.pictures[id as usize]));
        f64::from(together) * f64::from(self.total) / (a * b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stems_join_forms_of_a_word() {
        for (a, b) in
            [("dog", "dogs"), ("running", "run"), ("men", "man"), ("babies", "baby"), ("riding", "ride"), ("boxes", "box")]
        {
            assert_eq!(stem(a), stem(b), "{a} {b}");
        }
        for (a, b) in [("man", "woman"), ("grass", "glass"), ("red", "run"), ("ring", "string")] {
            assert_ne!(stem(a), stem(b), "{a} {b}");
        }
    }
}
