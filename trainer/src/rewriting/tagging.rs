//! Words of a caption with their parts of speech.
//!
//! The tagger is Harper's (Brill's transformation-based method over universal parts of speech). It was trained on edited prose;
//! captions are fragments, so what it does not know or often mistakes there is mended by rules of our own.

use std::ops::Range;

use harper_brill::{Tagger, UPOS, brill_tagger};

/// Part of speech, as coarse as scene graphs need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tag {
    /// Common or proper noun.
    Noun,
    /// Adjective, or a participle before a noun.
    Adjective,
    /// Numeral, or a word of quantity.
    Number,
    /// Verb with a meaning of its own.
    Verb,
    /// Be, have, do, and modal verbs.
    Auxiliary,
    /// Preposition or particle.
    Preposition,
    /// Article or other determiner, possessives included.
    Determiner,
    /// Pronoun, "there" included.
    Pronoun,
    /// Adverb.
    Adverb,
    /// And, or, but.
    Conjunction,
    /// While, as, because: begins a clause.
    Subordinator,
    /// Who, which, that: begins a relative clause.
    Relative,
    /// "To" before a verb, "not".
    Particle,
    /// Punctuation that ends a phrase.
    Break,
}

/// One word or punctuation mark of a caption.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// In lower case.
    pub text: String,
    /// Bytes of the caption.
    pub span: Range<usize>,
    /// Part of speech.
    pub tag: Tag,
}

/// Colours, which captions also use as nouns ("a woman in red").
pub(super) const COLOURS: [&str; 22] = [
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "black",
    "white",
    "gray",
    "grey",
    "brown",
    "pink",
    "beige",
    "tan",
    "gold",
    "silver",
    "blond",
    "blonde",
    "golden",
    "turquoise",
    "maroon",
    "navy",
];
const QUANTITIES: [&str; 6] = ["several", "many", "few", "multiple", "various", "numerous"];
/// Prepositions that the tagger takes for other parts of speech after nouns and verbs.
const PREPOSITIONS: [&str; 40] = [
    "in",
    "on",
    "at",
    "of",
    "with",
    "without",
    "over",
    "under",
    "through",
    "near",
    "by",
    "into",
    "onto",
    "from",
    "across",
    "along",
    "around",
    "behind",
    "beside",
    "between",
    "among",
    "above",
    "below",
    "beneath",
    "against",
    "towards",
    "toward",
    "inside",
    "off",
    "down",
    "up",
    "past",
    "out",
    "outside",
    "during",
    "amongst",
    "underneath",
    "alongside",
    "atop",
    "for",
];
/// Adverbs of place and manner that stand where a preposition could; none of them takes an object.
const ADVERBS: [&str; 12] = [
    "away",
    "together",
    "outdoors",
    "indoors",
    "overhead",
    "downhill",
    "uphill",
    "upside",
    "forward",
    "backwards",
    "apart",
    "very",
];
/// Nouns that the tagger takes for verbs or adjectives.
const NOUNS: [&str; 26] = [
    "building", "ceiling", "clothing", "painting", "railing", "wedding", "morning", "evening", "ring", "string", "swing",
    "stand", "ride", "drink", "trick", "jump", "rock", "people", "snow", "water", "race", "toy", "park", "sand", "crossing",
    "swimsuit",
];
/// Names of things that end like a participle.
const ING_NOUNS: [&str; 10] =
    ["building", "ceiling", "clothing", "painting", "railing", "wedding", "morning", "evening", "ring", "string"];

/// Splits a caption into words and punctuation and tags them.
#[must_use]
pub fn tag(caption: &str) -> Vec<Word> {
    let mut words = split(caption);
    let texts: Vec<String> = words.iter().map(|w| w.text.clone()).collect();
    let found = brill_tagger().tag_sentence(&texts);
    for i in 0..words.len() {
        words[i].tag =
            if is_break(&words[i].text) { Tag::Break } else { first_guess(&texts[i], found.get(i).copied().flatten()) };
    }
    mend(&mut words);
    words
}

fn is_break(text: &str) -> bool {
    !text.chars().any(char::is_alphanumeric)
}

fn split(caption: &str) -> Vec<Word> {
    let mut words = Vec::new();
    let mut push = |range: Range<usize>| {
        if !range.is_empty() {
            words.push(Word { text: caption[range.clone()].to_lowercase(), span: range, tag: Tag::Noun });
        }
    };
    let is_inner = |c: char| c.is_alphanumeric() || c == '-' || c == '\'' || c == '’';
    let mut start = None;
    for (at, c) in caption.char_indices() {
        match (is_inner(c), start) {
            (true, None) => start = Some(at),
            (true, Some(_)) => {}
            (false, begun) => {
                if let Some(begun) = begun {
                    push(begun..at);
                    start = None;
                }
                if !c.is_whitespace() && c != '"' {
                    push(at..at + c.len_utf8());
                }
            }
        }
    }
    if let Some(begun) = start {
        push(begun..caption.len());
    }
    words
}

fn first_guess(text: &str, found: Option<UPOS>) -> Tag {
    let text = text.trim_matches('\'');
    match text {
        "who" | "which" | "that" | "whose" => return Tag::Relative,
        "while" | "as" | "because" | "when" | "where" | "like" | "after" | "before" | "than" => return Tag::Subordinator,
        "and" | "or" | "but" | "&" => return Tag::Conjunction,
        "to" => return Tag::Preposition,
        "not" | "n't" => return Tag::Particle,
        "there" | "it" | "one" | "another" | "others" | "other's" | "themselves" | "himself" | "herself" | "itself" | "them"
        | "him" | "they" | "he" | "she" | "something" | "someone" | "everyone" | "what" => return Tag::Pronoun,
        "is" | "are" | "was" | "were" | "be" | "being" | "been" | "has" | "have" | "had" | "do" | "does" | "can" | "will"
        | "am" => {
            return Tag::Auxiliary;
        }
        "a" | "an" | "the" | "his" | "her" | "their" | "its" | "some" | "other" | "each" | "all" | "both" | "no" | "this"
        | "these" | "those" | "every" | "any" | "my" | "our" | "your" => return Tag::Determiner,
        "close" | "next" => return Tag::Adjective,
        _ => {}
    }
    if text.ends_with("'s") || text.ends_with("’s") || text.ends_with("s'") {
        return Tag::Determiner;
    }
    if COLOURS.contains(&text) {
        return Tag::Adjective;
    }
    if QUANTITIES.contains(&text) || text.chars().all(|c| c.is_ascii_digit()) {
        return Tag::Number;
    }
    if PREPOSITIONS.contains(&text) {
        return Tag::Preposition;
    }
    if ADVERBS.contains(&text) {
        return Tag::Adverb;
    }
    if NOUNS.contains(&text) && found != Some(UPOS::VERB) || ING_NOUNS.contains(&text) {
        return Tag::Noun;
    }
    match found {
        Some(UPOS::NOUN | UPOS::PROPN | UPOS::SYM | UPOS::INTJ) => Tag::Noun,
        Some(UPOS::ADJ) => Tag::Adjective,
        Some(UPOS::NUM) => Tag::Number,
        Some(UPOS::VERB) => Tag::Verb,
        Some(UPOS::AUX) => Tag::Auxiliary,
        Some(UPOS::ADP) => Tag::Preposition,
        Some(UPOS::DET) => Tag::Determiner,
        Some(UPOS::PRON) => Tag::Pronoun,
        Some(UPOS::ADV) => Tag::Adverb,
        Some(UPOS::CCONJ) => Tag::Conjunction,
        Some(UPOS::SCONJ) => Tag::Subordinator,
        Some(UPOS::PART) => Tag::Particle,
        Some(UPOS::PUNCT) => Tag::Break,
        _ => unknown(text),
    }
}

/// A word that the tagger has never seen, by its ending.
fn unknown(text: &str) -> Tag {
    if text.ends_with("ly") {
        Tag::Adverb
    } else if text.ends_with("ing") || text.ends_with("ed") {
        Tag::Verb
    } else if text.contains('-') && (text.ends_with("ed") || text.ends_with("ing")) {
        Tag::Adjective
    } else {
        Tag::Noun
    }
}

/// Mends tags by their neighbours.
fn mend(words: &mut [Word]) {
    let tag_at = |words: &[Word], i: usize| words.get(i).map_or(Tag::Break, |w| w.tag);
    for i in 0..words.len() {
        let before = i.checked_sub(1).map_or(Tag::Break, |b| words[b].tag);
        let (own, after) = (words[i].tag, tag_at(words, i + 1));
        let text = words[i].text.clone();
        let participle = text.ends_with("ing") || text.ends_with("ed") || text.ends_with("en");
        let opens = matches!(before, Tag::Determiner | Tag::Adjective | Tag::Number);
        let noun_follows = matches!(after, Tag::Noun)
            || matches!(after, Tag::Adjective | Tag::Number) && matches!(tag_at(words, i + 2), Tag::Noun | Tag::Adjective);
        words[i].tag = match own {
            Tag::Verb if opens && participle && (noun_follows || described_noun_follows(words, i)) => Tag::Adjective,
            // "The dogs both run": the determiner has no noun.
            Tag::Determiner if before == Tag::Noun && matches!(text.as_str(), "all" | "both" | "each") => Tag::Adverb,
            Tag::Noun if before == Tag::Noun && text.ends_with("ing") && !verb_before(words, i) && !noun_follows => {
                if ING_NOUNS.contains(&text.as_str()) { Tag::Noun } else { Tag::Verb }
            }
            Tag::Noun if before == Tag::Auxiliary && text.ends_with("ing") => Tag::Verb,
            Tag::Verb if before == Tag::Determiner && !participle => Tag::Noun,
            Tag::Verb if before == Tag::Adjective && !participle && !noun_follows && text.len() > 2 && verb_before(words, i) => {
                Tag::Noun
            }
            // "A bus stop", "the finish line": a verb would agree with its subject.
            Tag::Verb
                if before == Tag::Noun
                    && !participle
                    && !text.ends_with('s')
                    && !is_plural(&words[i - 1].text)
                    && looks_finite(&text) =>
            {
                Tag::Noun
            }
            // "In swim trunks".
            Tag::Verb if before == Tag::Preposition && !participle && after == Tag::Noun => Tag::Noun,
            // "In a square".
            Tag::Adjective
                if before == Tag::Determiner
                    && !participle
                    && !noun_follows
                    && !matches!(after, Tag::Adjective | Tag::Conjunction | Tag::Number) =>
            {
                Tag::Noun
            }
            // "Does a trick", "has a beard".
            Tag::Auxiliary
                if matches!(after, Tag::Determiner | Tag::Adjective | Tag::Noun) && HAVING.contains(&text.as_str()) =>
            {
                Tag::Verb
            }
            Tag::Noun if before == Tag::Noun && is_sentence_verb(words, i) => Tag::Verb,
            Tag::Adjective
                if text.ends_with("ing") && matches!(before, Tag::Noun | Tag::Auxiliary | Tag::Break) && !noun_follows =>
            {
                Tag::Verb
            }
            // A colour that stands for what has it.
            Tag::Adjective
                if COLOURS.contains(&text.as_str())
                    && before == Tag::Preposition
                    && !noun_follows
                    && after != Tag::Conjunction =>
            {
                Tag::Noun
            }
            Tag::Preposition if text == "to" && tag_at(words, i + 1) == Tag::Verb => Tag::Particle,
            own => own,
        };
    }
}

/// Whether a comma or "and" and another description stand between here and the noun: "a collared, striped shirt".
fn described_noun_follows(words: &[Word], at: usize) -> bool {
    let tag = |i: usize| words.get(i).map_or(Tag::Break, |w| w.tag);
    let more = words.get(at + 2).is_some_and(|w| w.tag == Tag::Adjective || w.text.ends_with("ed") || w.text.ends_with("ing"));
    matches!(tag(at + 1), Tag::Break | Tag::Conjunction) && more && tag(at + 3) == Tag::Noun
}

/// "Do" and "have" where they are the only verb.
const HAVING: [&str; 5] = ["does", "do", "has", "have", "had"];

pub(super) fn is_plural(noun: &str) -> bool {
    const IRREGULAR: [&str; 6] = ["people", "men", "women", "children", "police", "sheep"];
    noun.ends_with('s') && !noun.ends_with("ss") || IRREGULAR.contains(&noun)
}

/// Whether a noun after a noun is rather what the first does: the two agree in number as subject and verb do, nothing else in
/// the clause is its verb, and it stands where a verb can.
fn is_sentence_verb(words: &[Word], at: usize) -> bool {
    let text = &words[at].text;
    let agrees = is_plural(&words[at - 1].text) != (text.ends_with('s') && !text.ends_with("ss"));
    if !agrees || finite_before(words, at) || finite_after(words, at) {
        return false;
    }
    let mut clause = words[..at].iter().rev().take_while(|w| w.tag != Tag::Subordinator);
    let first_phrase = clause.all(|w| !matches!(w.tag, Tag::Preposition | Tag::Verb) || w.text == "of");
    match words.get(at + 1).map(|w| w.tag) {
        Some(Tag::Determiner) => true,
        Some(Tag::Preposition | Tag::Noun | Tag::Adjective) => first_phrase || looks_finite(text),
        None | Some(Tag::Break) => looks_finite(text) && first_phrase,
        _ => false,
    }
}

fn is_finite(word: &Word) -> bool {
    word.tag == Tag::Auxiliary || word.tag == Tag::Verb && !word.text.ends_with("ing") && !word.text.ends_with("ed")
}

fn finite_before(words: &[Word], at: usize) -> bool {
    words[..at].iter().rev().take_while(|w| !matches!(w.tag, Tag::Subordinator | Tag::Conjunction)).any(is_finite)
}

fn finite_after(words: &[Word], at: usize) -> bool {
    let ends = |w: &&Word| !matches!(w.tag, Tag::Subordinator | Tag::Conjunction | Tag::Relative | Tag::Break);
    words[at + 1..].iter().take_while(ends).any(is_finite)
}

fn verb_before(words: &[Word], at: usize) -> bool {
    let clause = words[..at].iter().rev().take_while(|w| w.tag != Tag::Subordinator);
    clause.into_iter().any(|w| matches!(w.tag, Tag::Verb | Tag::Auxiliary))
}

/// Verbs of captions that are nouns as well.
fn looks_finite(text: &str) -> bool {
    const BOTH: [&str; 62] = [
        "jump", "run", "walk", "play", "stand", "ride", "swim", "dance", "race", "fight", "rest", "smile", "wave", "watch",
        "work", "talk", "look", "climb", "slide", "swing", "surf", "ski", "skate", "pose", "kiss", "hug", "laugh", "leap",
        "sleep", "dive", "kick", "throw", "catch", "hit", "push", "pull", "drink", "cook", "paint", "sit", "march", "hike",
        "row", "chase", "drive", "shake", "float", "lean", "jog", "repair", "spray", "shoot", "feed", "hang", "block", "stop",
        "cross", "sprint", "balance", "paddle", "tackle", "splash",
    ];
    let bare = text.strip_suffix("es").filter(|b| BOTH.contains(b)).or_else(|| text.strip_suffix('s')).unwrap_or(text);
    BOTH.contains(&bare)
}
