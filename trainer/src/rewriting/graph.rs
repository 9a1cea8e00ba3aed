//! Scene graphs of captions: objects, their attributes, and the relations between them.

use super::tagging::{Tag, Word, tag};

/// A thing that a caption names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Its head noun: index of the word.
    pub head: usize,
    /// Words that describe it, in order.
    pub attributes: Vec<usize>,
    /// First word of its noun phrase, determiner included.
    pub first: usize,
}

/// What one object does to, or where it is from, another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// Index of the object that the relation starts from.
    pub subject: usize,
    /// Words of the predicate: a verb without auxiliaries, prepositions, or both.
    pub predicate: Vec<usize>,
    /// Index of the object that it leads to.
    pub object: usize,
}

/// A caption's words and what they say.
#[derive(Debug, Clone, Default)]
pub struct SceneGraph {
    /// All words, in order.
    pub words: Vec<Word>,
    /// Things named.
    pub objects: Vec<Object>,
    /// Relations between them.
    pub relations: Vec<Relation>,
}

/// Nouns that count or gather what follows their "of".
const COLLECTIVES: [&str; 24] = [
    "group",
    "pair",
    "couple",
    "bunch",
    "crowd",
    "herd",
    "flock",
    "pile",
    "row",
    "line",
    "number",
    "team",
    "lot",
    "set",
    "variety",
    "stack",
    "collection",
    "trio",
    "series",
    "bundle",
    "lots",
    "groups",
    "pairs",
    "dozens",
];
/// Who can do what a participle after them says.
const ANIMATE: [&str; 48] = [
    "man",
    "men",
    "woman",
    "women",
    "boy",
    "boys",
    "girl",
    "girls",
    "child",
    "children",
    "kid",
    "kids",
    "person",
    "people",
    "baby",
    "toddler",
    "lady",
    "ladies",
    "guy",
    "guys",
    "dog",
    "dogs",
    "puppy",
    "cat",
    "cats",
    "horse",
    "horses",
    "bird",
    "birds",
    "player",
    "players",
    "rider",
    "riders",
    "couple",
    "friend",
    "friends",
    "crowd",
    "team",
    "worker",
    "workers",
    "dancer",
    "dancers",
    "teenager",
    "teenagers",
    "mother",
    "father",
    "surfer",
    "skier",
];
/// Parts that, between a preposition and "of", only say where.
const PLACES: [&str; 15] = [
    "front", "middle", "side", "edge", "top", "back", "bottom", "center", "centre", "end", "rear", "foot", "corner", "sides",
    "edges",
];

impl SceneGraph {
    /// Parses a caption.
    #[must_use]
    pub fn of(caption: &str) -> Self {
        let mut parser = Parser { graph: Self { words: tag(caption), ..Self::default() }, clause: Clause::default(), at: 0 };
        parser.run();
        parser.graph
    }

    /// The predicate's words, with single spaces.
    #[must_use]
    pub fn predicate(&self, relation: &Relation) -> String {
        relation.predicate.iter().map(|&w| self.words[w].text.as_str()).collect::<Vec<_>>().join(" ")
    }
}

/// What has been said so far of the clause being read.
#[derive(Default)]
struct Clause {
    /// Who the next verb or preposition speaks of.
    subjects: Vec<usize>,
    /// Words of a predicate that has no object yet.
    pending: Vec<usize>,
    /// Who the pending predicate speaks of.
    speakers: Vec<usize>,
    /// The last complete predicate and its speakers, for "a hat and a coat".
    last: Option<(Vec<usize>, Vec<usize>)>,
    /// The object last named.
    nearest: Option<usize>,
    /// A verb was read.
    has_verb: bool,
    /// A verb was read that makes a sentence of the clause: no bare participle.
    finite: bool,
    /// The last object came by a preposition.
    by_preposition: bool,
    /// A conjunction or comma stands between the last noun phrase and here.
    joined: bool,
    /// An auxiliary stands directly before.
    auxiliary: bool,
}

struct Parser {
    graph: SceneGraph,
    clause: Clause,
    at: usize,
}

impl Parser {
    fn tag(&self, at: usize) -> Tag {
        self.graph.words.get(at).map_or(Tag::Break, |w| w.tag)
    }

    fn text(&self, at: usize) -> &str {
        self.graph.words.get(at).map_or("", |w| &w.text)
    }

    fn run(&mut self) {
        while self.at < self.graph.words.len() {
            if let Some(place) = self.place() {
                self.preposition(place);
                continue;
            }
            if let Some((phrase, next)) = self.noun_phrase() {
                self.at = next;
                self.name(phrase);
                continue;
            }
            let at = self.at;
            self.at += 1;
            match self.tag(at) {
                Tag::Verb => self.verb(at),
                Tag::Auxiliary => {
                    self.flush();
                    self.clause.auxiliary = true;
                    self.clause.has_verb = true;
                    self.clause.finite = true;
                    continue;
                }
                Tag::Preposition => self.preposition(vec![at]),
                // "Full of people", "dirty from the mud".
                Tag::Adjective if self.clause.nearest.is_some() && self.tag(self.at) == Tag::Preposition => self.verb(at),
                Tag::Adjective | Tag::Number if self.clause.auxiliary || self.clause.pending.is_empty() => {
                    self.predicate_adjective(at)
                }
                Tag::Conjunction => self.clause.joined = true,
                Tag::Break => {
                    self.flush();
                    self.clause.joined = true;
                }
                Tag::Subordinator => self.subordinate(),
                Tag::Relative => {
                    self.flush();
                    self.clause.subjects = self.clause.nearest.into_iter().collect();
                    self.clause.joined = false;
                }
                // "One holding a ball": nothing of it is said of an object.
                Tag::Pronoun if self.text(at) != "there" => {
                    if self.clause.pending.is_empty() {
                        self.clause.subjects.clear();
                        self.clause.nearest = None;
                    }
                    self.flush_into(false);
                }
                _ => continue,
            }
            self.clause.auxiliary = false;
        }
        self.flush();
    }

    /// A preposition made of several words ("in front of", "next to"), from here.
    fn place(&mut self) -> Option<Vec<usize>> {
        let at = self.at;
        if matches!(self.text(at), "next" | "close") && self.text(at + 1) == "to" {
            let end = self.part_of(at + 2).unwrap_or(at + 2);
            self.at = end;
            return Some((at..end).collect());
        }
        if self.tag(at) != Tag::Preposition {
            return None;
        }
        let end = self.part_of(at + 1)?;
        self.at = end;
        Some((at..end).collect())
    }

    /// Where "the edge of" ends, if it stands at `at`.
    fn part_of(&self, at: usize) -> Option<usize> {
        let noun = at + usize::from(self.tag(at) == Tag::Determiner);
        (PLACES.contains(&self.text(noun)) && self.text(noun + 1) == "of").then_some(noun + 2)
    }

    /// A noun phrase from here, and where it ends.
    fn noun_phrase(&self) -> Option<(Object, usize)> {
        let first = self.at;
        let mut at = first;
        let mut described = Vec::new();
        let mut head = None;
        loop {
            match self.tag(at) {
                Tag::Determiner if head.is_none() => {}
                Tag::Adjective | Tag::Number if head.is_none() => described.push(at),
                Tag::Adverb if head.is_none() && matches!(self.tag(at + 1), Tag::Adjective) && at > first => {}
                Tag::Noun => {
                    described.extend(head);
                    head = Some(at);
                }
                // A possessor: what it has is the object.
                Tag::Determiner if self.text(at).contains('\'') => {}
                // "Black and white dog", "a big, red ball".
                Tag::Conjunction | Tag::Break
                    if head.is_none() && !described.is_empty() && matches!(self.tag(at + 1), Tag::Adjective | Tag::Number) => {}
                _ => break,
            }
            at += 1;
        }
        let mut head = head?;
        // "A group of people": the people.
        if COLLECTIVES.contains(&self.text(head)) && self.text(at) == "of" {
            let inner = Self { graph: self.graph.clone(), clause: Clause::default(), at: at + 1 };
            if let Some((object, next)) = inner.noun_phrase() {
                described.push(head);
                described.extend(object.attributes);
                head = object.head;
                at = next;
            }
        }
        Some((Object { head, attributes: described, first }, at))
    }

    /// A noun phrase: the object of what is pending, or a subject.
    fn name(&mut self, object: Object) {
        // "In a suit and top hat holding a cane": only what has its verb already, or can act, makes room for another subject.
        let acts = ANIMATE.contains(&self.text(object.head)) || self.clause.finite;
        let finite_follows = acts && self.verb_follows();
        let index = self.graph.objects.len();
        self.graph.objects.push(object);
        let clause = &mut self.clause;
        if !clause.pending.is_empty() && !clause.joined {
            let predicate = std::mem::take(&mut clause.pending);
            let speakers = std::mem::take(&mut clause.speakers);
            for &subject in &speakers {
                self.graph.relations.push(Relation { subject, predicate: predicate.clone(), object: index });
            }
            clause.last = Some((speakers, predicate));
        } else if clause.joined && clause.last.is_some() && !finite_follows {
            // One more object of the last predicate.
            if let Some((speakers, predicate)) = clause.last.clone() {
                for subject in speakers {
                    self.graph.relations.push(Relation { subject, predicate: predicate.clone(), object: index });
                }
            }
        } else if clause.joined && clause.last.is_none() && !clause.has_verb {
            clause.subjects.push(index);
        } else {
            self.flush();
            self.clause = Clause { subjects: vec![index], ..Clause::default() };
        }
        self.clause.nearest = Some(index);
        self.clause.joined = false;
        self.clause.auxiliary = false;
    }

    /// Whether a verb follows the noun phrase just read.
    fn verb_follows(&self) -> bool {
        let next = (self.at..).find(|&at| self.tag(at) != Tag::Adverb);
        next.is_some_and(|at| matches!(self.tag(at), Tag::Auxiliary | Tag::Verb))
    }

    fn verb(&mut self, at: usize) {
        let continues = matches!(self.clause.pending.last(), Some(&last) if at > last && self.is_infinitive(last, at));
        if continues {
            let last = self.clause.pending[self.clause.pending.len() - 1];
            self.clause.pending.extend((last + 1..=at).filter(|&i| self.graph.words[i].tag != Tag::Adverb));
            return;
        }
        self.flush();
        let clause = &mut self.clause;
        let participle = self.graph.words[at].text.ends_with("ing") && !clause.auxiliary && !clause.joined;
        if participle
            && !clause.by_preposition
            && let (Some(nearest), Some(_)) = (clause.nearest, &clause.last)
            && ANIMATE.contains(&self.graph.words[self.graph.objects[nearest].head].text.as_str())
        {
            // "A man holding a dog wearing a hat": the dog wears it.
            clause.subjects = vec![nearest];
        }
        clause.pending = vec![at];
        clause.speakers.clone_from(&clause.subjects);
        clause.has_verb = true;
        clause.finite |= !self.graph.words[at].text.ends_with("ing");
        clause.joined = false;
        clause.by_preposition = false;
    }

    /// "Trying to catch": the words between are "to" and adverbs only.
    fn is_infinitive(&self, last: usize, at: usize) -> bool {
        (last + 1..at).any(|i| self.text(i) == "to") && (last + 1..at).all(|i| matches!(self.tag(i), Tag::Particle | Tag::Adverb))
    }

    fn preposition(&mut self, words: Vec<usize>) {
        let of = words.len() == 1 && self.text(words[0]) == "of";
        let clause = &mut self.clause;
        if clause.joined {
            self.flush();
        }
        let clause = &mut self.clause;
        if clause.pending.is_empty() {
            clause.speakers = if of { clause.nearest.into_iter().collect() } else { clause.subjects.clone() };
            clause.pending = words;
        } else {
            clause.pending.extend(words);
        }
        clause.by_preposition = true;
        clause.joined = false;
        clause.auxiliary = false;
    }

    fn predicate_adjective(&mut self, at: usize) {
        if !self.clause.auxiliary && !self.clause.has_verb {
            return;
        }
        for &subject in &self.clause.subjects {
            self.graph.objects[subject].attributes.push(at);
        }
    }

    fn subordinate(&mut self) {
        self.flush();
        let subjects = std::mem::take(&mut self.clause.subjects);
        self.clause = Clause { nearest: subjects.first().copied(), ..Clause::default() };
        // "While holding a ball" has the subject of the clause before.
        let mut at = self.at;
        while self.tag(at) == Tag::Adverb {
            at += 1;
        }
        if self.tag(at) == Tag::Verb {
            self.clause.subjects = subjects;
        }
    }

    fn flush(&mut self) {
        self.flush_into(true);
    }

    /// Ends a predicate without an object: its verb becomes an attribute of who it speaks of.
    fn flush_into(&mut self, keep: bool) {
        let pending = std::mem::take(&mut self.clause.pending);
        let speakers = std::mem::take(&mut self.clause.speakers);
        let Some(&verb) = pending.first().filter(|&&w| self.tag(w) == Tag::Verb) else { return };
        if keep {
            for subject in speakers {
                self.graph.objects[subject].attributes.push(verb);
            }
        }
    }
}
