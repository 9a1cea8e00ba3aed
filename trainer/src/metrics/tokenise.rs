//! Penn-Treebank-like tokenisation of captions, as caption scores are usually computed.
//!
//! Published BLEU, ROUGE-L and CIDEr values rest on the Stanford PTB tokenizer (lower case, punctuation tokens dropped) as
//! `pycocoevalcap` runs it. This follows its behaviour on captions: hyphenated words stay whole, contractions are split
//! (`do n't`, `man 's`), abbreviations and acronyms keep their dots, brackets become `-lrb-`/`-rrb-` and stay. It is not the
//! whole grammar of that tokenizer: e-mail addresses, emoticons and mark-up are not treated specially.

/// Tokens of one caption.
#[must_use]
pub fn tokenise(caption: &str) -> Vec<String> {
    let text = normalise(caption);
    let mut tokens = Vec::new();
    let mut chunks = text.split_whitespace().peekable();
    while let Some(chunk) = chunks.next() {
        let next = chunks.peek().and_then(|next| next.chars().next());
        Scanner { chars: chunk.chars().collect(), at: 0, next }.scan(&mut tokens);
    }
    tokens.retain(|token| !is_dropped(token));
    tokens
}

/// Tokens that count as punctuation.
fn is_dropped(token: &str) -> bool {
    matches!(token, "''" | "'" | "``" | "`" | "." | "?" | "!" | "," | ":" | "-" | "--" | "..." | ";")
}

/// Typographic characters in plain form, and the XML entities that the collections are littered with.
fn normalise(caption: &str) -> String {
    let mut text = String::with_capacity(caption.len() + 8);
    for c in caption.chars() {
        match c {
            '\u{2018}' => text.push('`'),
            '\u{2019}' => text.push('\''),
            '\u{201c}' | '\u{201d}' => text.push('"'),
            '\u{2013}' | '\u{2014}' => text.push_str(" -- "),
            '\u{2026}' => text.push_str(" ... "),
            '\u{00ad}' => {}
            c => text.push(c),
        }
    }
    for (entity, plain) in [("&amp;", "&"), ("&quot;", "\""), ("&apos;", "'"), ("&lt;", "<"), ("&gt;", ">"), ("&nbsp;", " ")] {
        if text.contains(entity) {
            text = text.replace(entity, plain);
        }
    }
    text
}

/// Splits one run of characters without white space.
struct Scanner {
    chars: Vec<char>,
    at: usize,
    /// What follows after the white space; none at the end of the caption.
    next: Option<char>,
}

impl Scanner {
    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    /// The next `n` characters as a token.
    fn take(&mut self, n: usize, tokens: &mut Vec<String>) {
        tokens.push(lower(&self.chars[self.at..self.at + n]));
        self.at += n;
    }

    fn run_of(&self, c: char) -> usize {
        self.chars[self.at..].iter().take_while(|&&x| x == c).count()
    }

    fn scan(mut self, tokens: &mut Vec<String>) {
        while let Some(c) = self.peek(0) {
            match c {
                _ if c.is_alphanumeric() => self.word(tokens),
                '\'' => self.apostrophe(tokens),
                '.' => match self.run_of('.') {
                    1 if self.peek(1).is_some_and(|d| d.is_ascii_digit()) => self.word(tokens),
                    dots @ 3.. => {
                        tokens.push("...".into());
                        self.at += dots;
                    }
                    _ => self.take(1, tokens),
                },
                '-' | '+' if self.at == 0 && self.peek(1).is_some_and(|d| d.is_ascii_digit()) => self.word(tokens),
                '-' => match self.run_of('-') {
                    1 => self.take(1, tokens),
                    dashes => {
                        tokens.push("--".into());
                        self.at += dashes;
                    }
                },
                '!' | '?' => {
                    let run = self.chars[self.at..].iter().take_while(|&&x| x == '!' || x == '?').count();
                    self.take(run, tokens);
                }
                '@' | '#' if self.peek(1).is_some_and(char::is_alphabetic) => self.word(tokens),
                '"' => {
                    tokens.push("''".into());
                    self.at += 1;
                }
                '`' => {
                    let run = self.run_of('`');
                    self.take(run.min(2), tokens);
                }
                '(' | ')' | '[' | ']' | '{' | '}' => {
                    tokens.push(bracket(c).into());
                    self.at += 1;
                }
                _ => self.take(1, tokens),
            }
        }
    }

    /// `'s` and its like after a word, `'em`, `'n'` and `'90s` on their own, or a quote.
    fn apostrophe(&mut self, tokens: &mut Vec<String>) {
        if self.peek(1) == Some('\'') {
            return self.take(2, tokens);
        }
        let letters = self.letters_from(1);
        if self.peek(1) == Some('n') && self.peek(2) == Some('\'') {
            return self.take(3, tokens);
        }
        if SUFFIXES.contains(&letters.as_str()) || ELIDED.contains(&letters.as_str()) {
            return self.take(1 + letters.len(), tokens);
        }
        let digits = self.chars[self.at + 1..].iter().take_while(|c| c.is_ascii_digit()).count();
        if digits == 2 {
            let s = usize::from(self.peek(3) == Some('s'));
            if !self.peek(3 + s).is_some_and(|c| c.is_alphanumeric() || c == '\'') {
                return self.take(3 + s, tokens);
            }
        }
        if letters == "twas" || letters == "tis" {
            // “'t is”
            self.take(2, tokens);
            return self.take(letters.len() - 1, tokens);
        }
        self.take(1, tokens);
    }

    /// The letters from `ahead` on, in lower case; none where a digit follows them.
    fn letters_from(&self, ahead: usize) -> String {
        let rest = self.chars.get(self.at + ahead..).unwrap_or_default();
        let letters = rest.iter().take_while(|c| c.is_alphabetic()).count();
        match rest.get(letters) {
            Some(c) if c.is_ascii_digit() => String::new(),
            _ => lower(&rest[..letters]),
        }
    }

    fn word(&mut self, tokens: &mut Vec<String>) {
        let start = self.at;
        self.at += 1;
        while let Some(c) = self.peek(0) {
            let (before, after) = (self.chars[self.at - 1], self.peek(1));
            let between_words = after.is_some_and(char::is_alphanumeric);
            let between_digits = before.is_ascii_digit() && after.is_some_and(|d| d.is_ascii_digit());
            let joined = match c {
                _ if c.is_alphanumeric() => true,
                '_' | '-' | '/' | '@' | '.' => between_words,
                // “A&M”, but “rock & roll” from “rock&roll”.
                '&' => before.is_uppercase() && after.is_some_and(char::is_uppercase),
                ',' | ':' => between_digits,
                '\'' => between_words && !self.splits_here(start),
                _ => false,
            };
            if !joined {
                break;
            }
            self.at += 1;
        }
        let mut word = lower(&self.chars[start..self.at]);
        if self.peek(0) == Some('.') && self.keeps_dot(&word) {
            word.push('.');
            self.at += 1;
        }
        if let Some(stem) = word.strip_suffix("n't").filter(|stem| !stem.is_empty()) {
            tokens.push(stem.to_owned());
            tokens.push("n't".into());
        } else if let Some(&(_, cut)) = ASSIMILATED.iter().find(|(whole, _)| *whole == word) {
            tokens.push(word[..cut].to_owned());
            tokens.push(word[cut..].to_owned());
        } else {
            tokens.push(word);
        }
    }

    /// Whether the apostrophe here starts a token of its own.
    fn splits_here(&self, start: usize) -> bool {
        let letters = self.letters_from(1);
        if SUFFIXES.contains(&letters.as_str()) {
            return true;
        }
        // “rock'n'roll”
        if self.peek(1) == Some('n') && self.peek(2) == Some('\'') {
            return true;
        }
        let word = lower(&self.chars[start..self.at]);
        if letters == "t" && word.len() > 1 && word.ends_with('n') {
            return false;
        }
        // “o'clock”, “d'oeuvre”, “ma'am” stay whole; “boys'shirts” does not.
        !matches!(word.as_str(), "d" | "l" | "o" | "j" | "n" | "ma" | "qu" | "y" | "ol")
    }

    /// Whether a dot after this word (in lower case) belongs to it.
    fn keeps_dot(&self, word: &str) -> bool {
        let letter = |part: &str| part.chars().count() == 1 && part.chars().all(char::is_alphabetic);
        // “plan b.”, “u.s.”; “as old as i. he” ends a sentence.
        let initials = word.split('.').all(letter) && (word != "i" || self.next.is_none());
        let numbered = word == "no" && self.next.is_some_and(|c| c.is_ascii_digit());
        initials || numbered || (self.peek(1) != Some('.') || word == "etc") && ABBREVIATIONS.contains(&word)
    }
}

fn lower(chars: &[char]) -> String {
    chars.iter().flat_map(|c| c.to_lowercase()).collect()
}

fn bracket(c: char) -> &'static str {
    match c {
        '(' => "-lrb-",
        ')' => "-rrb-",
        '[' => "-lsb-",
        ']' => "-rsb-",
        '{' => "-lcb-",
        _ => "-rcb-",
    }
}

/// What an apostrophe splits off a word.
const SUFFIXES: [&str; 6] = ["s", "d", "m", "re", "ve", "ll"];

/// Words whose beginning an apostrophe stands for.
const ELIDED: [&str; 3] = ["em", "til", "cause"];

/// Words written together that count as two, and where the second begins.
const ASSIMILATED: [(&str, usize); 7] =
    [("cannot", 3), ("gonna", 3), ("gotta", 3), ("wanna", 3), ("lemme", 3), ("gimme", 3), ("y'all", 2)];

/// Abbreviations that keep their dot.
const ABBREVIATIONS: &[&str] = &[
    "mr", "mrs", "ms", "dr", "drs", "prof", "sen", "rep", "gov", "rev", "gen", "col", "lt", "sgt", "capt", "st", "ste", "mt",
    "ft", "jr", "sr", "ave", "blvd", "rd", "inc", "co", "corp", "ltd", "dept", "bros", "etc", "vs", "univ", "cos", "pres", "maj",
    "hon", "det", "esq", "ph.d", "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec", "mon",
    "tue", "tues", "wed", "thu", "thurs", "fri",
];
