//! Text to ids and back: byte-level BPE with the project's special ids.

use std::path::{Path, PathBuf};

/// `[CLS]`, first of every text.
pub const CLS: u32 = 0;
/// `[PAD]`, fills a text to a fixed length.
pub const PAD: u32 = 1;
/// `[SEP]`, last of every text.
pub const SEP: u32 = 2;
/// `[UNK]`, a piece that the vocabulary cannot spell.
pub const UNK: u32 = 3;

/// Why a tokenizer was refused.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Not a `tokenizer.json`.
    #[error("not a tokenizer.json: {0}")]
    Malformed(String),
    /// A special token is missing or has another id than this project's models expect.
    #[error("the tokenizer gives {token} the id {}, the model needs {expected}", found.map_or_else(|| "none".to_owned(), |id| id.to_string()))]
    SpecialToken {
        /// The token.
        token: &'static str,
        /// The id the contract fixes.
        expected: u32,
        /// The id in the file.
        found: Option<u32>,
    },
}

/// A `tokenizer.json` whose special ids are `[CLS]` 0, `[PAD]` 1, `[SEP]` 2, `[UNK]` 3 and `[MASK]` last.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocabulary_size: usize,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// Where the file cannot be read or [`Self::from_bytes`] refuses its content.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let bytes = std::fs::read(path).map_err(|source| TokenizerError::Unreadable { path: path.to_path_buf(), source })?;
        Self::from_bytes(&bytes)
    }

    /// Parses a `tokenizer.json` and checks its special ids.
    ///
    /// # Errors
    /// Where the content is malformed or a special token has another id.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let malformed = |error: tokenizers::Error| TokenizerError::Malformed(error.to_string());
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(malformed)?;
        let vocabulary_size = inner.get_vocab_size(true);
        let last = u32::try_from(vocabulary_size).unwrap_or(u32::MAX).saturating_sub(1);
        for (token, expected) in [("[CLS]", CLS), ("[PAD]", PAD), ("[SEP]", SEP), ("[UNK]", UNK), ("[MASK]", last)] {
            let found = inner.token_to_id(token);
            if found != Some(expected) {
                return Err(TokenizerError::SpecialToken { token, expected, found });
            }
        }
        // Lengths and special tokens are the model's business, and "[SEP]" typed by a user is text.
        inner.with_truncation(None).map_err(malformed)?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(true);
        // Encoding fails only where the model cannot spell a piece and has no [UNK] of its own: found out here, once.
        let printable: String = (' '..='~').collect();
        inner.encode_fast(printable, false).map_err(malformed)?;
        Ok(Self { inner, vocabulary_size })
    }

    /// Number of ids, special ones included.
    #[must_use]
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary_size
    }

    /// The id of `[MASK]`, the last one.
    #[must_use]
    pub fn mask(&self) -> u32 {
        // Checked against a u32 id when the tokenizer was opened.
        self.vocabulary_size as u32 - 1
    }

    /// Whether an id stands for no text: `[CLS]`, `[PAD]`, `[SEP]`, `[UNK]` or `[MASK]`.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        id <= UNK || id == self.mask()
    }

    /// Whether an id begins a word: the byte-level vocabulary spells the space before it.
    #[must_use]
    pub fn begins_word(&self, id: u32) -> bool {
        self.inner.id_to_token(id).is_some_and(|token| token.starts_with('Ġ'))
    }

    /// At most `max_words` ids of [`normalise`]d text, without `[CLS]` and `[SEP]`.
    #[must_use]
    pub fn encode(&self, text: &str, max_words: usize) -> Vec<u32> {
        let mut ids = match self.inner.encode_fast(normalise(text), false) {
            Ok(encoding) => encoding.get_ids().to_vec(),
            Err(_) => vec![UNK],
        };
        ids.truncate(max_words);
        ids
    }

    /// The text of ids on one line: special ids left out, white space and control characters collapsed to single spaces (a
    /// byte-level vocabulary can spell them). Bytes that are no UTF-8 become U+FFFD.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        let words: Vec<u32> = ids.iter().copied().filter(|&id| !self.is_special(id)).collect();
        one_line(&self.inner.decode(&words, true).unwrap_or_default())
    }
}

/// Text without line breaks, tabs and terminal escapes.
fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()).collect();
    words.join(" ")
}

/// What every training caption and every query passes before it is encoded: white space collapsed and trimmed, lower case,
/// full stops at the end removed.
///
/// ```
/// assert_eq!(unimo::tokenizer::normalise("A  dog runs . "), "a dog runs");
/// ```
#[must_use]
pub fn normalise(text: &str) -> String {
    let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
    words.join(" ").trim_end_matches(['.', ' ']).to_owned()
}

#[cfg(test)]
pub(crate) mod tests {
    use tokenizers::models::bpe::{BPE, BpeTrainer};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{AddedToken, TokenizerBuilder};

    use super::*;

    /// A byte-level tokenizer trained on three captions, with `first` as special tokens and `[MASK]` last.
    pub(crate) fn json(first: [&str; 4], mask: bool) -> Vec<u8> {
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(320)
            .special_tokens(first.map(|token| AddedToken::from(token, true)).to_vec())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let byte_level = ByteLevel::new(true, true, true);
        let mut tokenizer = TokenizerBuilder::<BPE, tokenizers::NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel>::new()
            .with_model(BPE::default())
            .with_normalizer(None)
            .with_pre_tokenizer(Some(byte_level))
            .with_post_processor(None)
            .with_decoder(Some(byte_level))
            .build()
            .unwrap();
        let captions = ["a dog runs on the beach", "two dogs run on the grass", "a red circle above a blue square"];
        tokenizer.train(&mut trainer, captions.iter().copied()).unwrap();
        if mask {
            tokenizer.add_special_tokens([AddedToken::from("[MASK]", true)]).unwrap();
        }
        tokenizer.to_string(false).unwrap().into_bytes()
    }

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_bytes(&json(["[CLS]", "[PAD]", "[SEP]", "[UNK]"], true)).unwrap()
    }

    #[test]
    fn normalises() {
        for (text, expected) in [
            ("A Dog .", "a dog"),
            ("  a\tdog\nruns.  ", "a dog runs"),
            ("wait ...", "wait"),
            ("3.5 metres", "3.5 metres"),
            (". .", ""),
            ("", ""),
            ("ÄRMEL", "ärmel"),
        ] {
            assert_eq!(normalise(text), expected, "{text:?}");
        }
    }

    #[test]
    fn encodes_and_decodes() {
        let tokenizer = tokenizer();
        for text in ["a dog runs on the beach", "zebra 🦓 naïve", "[SEP] [CLS] is text"] {
            let ids = tokenizer.encode(text, 1000);
            assert!(ids.iter().all(|&id| !tokenizer.is_special(id)), "{text}: {ids:?}");
            assert_eq!(tokenizer.decode(&ids), normalise(text));
        }
    }

    #[test]
    fn what_is_decoded_fits_on_a_line() {
        for (text, expected) in [
            ("a dog\n runs\t", "a dog runs"),
            ("a\u{1b}[2Jdog\u{3}", "a [2Jdog"),
            ("\u{1c}", ""),
            ("two\u{85}lines\u{2028}here", "two lines here"),
        ] {
            assert_eq!(one_line(text), expected, "{text:?}");
        }
    }

    #[test]
    fn truncates_and_skips_specials() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("a dog runs on the beach", 3);
        assert_eq!(ids.len(), 3);
        let framed = [&[CLS], ids.as_slice(), &[SEP, PAD, UNK, tokenizer.mask()]].concat();
        assert_eq!(tokenizer.decode(&framed), tokenizer.decode(&ids));
        assert_eq!(tokenizer.encode("", 8), Vec::<u32>::new());
        assert_eq!(tokenizer.mask() as usize, tokenizer.vocabulary_size() - 1);
    }

    #[test]
    fn refusals() {
        let cases: [(&str, Vec<u8>, &str); 3] = [
            ("text", b"{}".to_vec(), "not a tokenizer.json"),
            ("order", json(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], true), "gives [CLS] the id 1, the model needs 0"),
            ("mask", json(["[CLS]", "[PAD]", "[SEP]", "[UNK]"], false), "gives [MASK] the id none"),
        ];
        for (name, bytes, message) in cases {
            let error = Tokenizer::from_bytes(&bytes).unwrap_err().to_string();
            assert!(error.contains(message), "{name}: {error}");
        }
    }
}
