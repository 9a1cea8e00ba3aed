//! Training of the byte-level BPE vocabulary.

use anyhow::{Result, anyhow, bail};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::utils::Lowercase;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Model, TokenizerBuilder};

/// Trains a byte-level BPE tokenizer of at most `vocabulary` tokens and returns its `tokenizer.json`.
///
/// Ids 0–3 are `[CLS] [PAD] [SEP] [UNK]`, the last one is `[MASK]`. Texts are normalised by the runtime's own rule first, so
/// that training and serving read them alike. A small corpus may not fill the vocabulary.
///
/// # Errors
/// No text, or a vocabulary too small for the 256 bytes and the special tokens.
pub fn train<'a>(texts: impl Iterator<Item = &'a str>, vocabulary: usize) -> Result<String> {
    if vocabulary < 256 + 5 {
        bail!("a byte-level vocabulary needs at least 261 tokens (256 bytes and 5 special ones), not {vocabulary}");
    }
    let texts: Vec<String> = texts.map(unimo::tokenizer::normalise).filter(|t| !t.is_empty()).collect();
    if texts.is_empty() {
        bail!("there is no text to train on");
    }
    let byte_level = ByteLevel::new(true, false, true);
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let special = |token: &str| AddedToken::from(token, true);
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocabulary - 1)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(alphabet.into_iter().collect())
        .special_tokens(["[CLS]", "[PAD]", "[SEP]", "[UNK]"].map(special).to_vec())
        .build();
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(Some(Lowercase))
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level))
        .build()
        .map_err(|e| anyhow!("cannot build the tokenizer: {e}"))?;
    tokenizer.train(&mut trainer, texts.iter()).map_err(|e| anyhow!("cannot train the tokenizer: {e}"))?;
    let merged = tokenizer.get_model().get_vocab_size();
    tokenizer.add_special_tokens([special("[MASK]")]).map_err(|e| anyhow!("cannot add [MASK]: {e}"))?;
    if tokenizer.token_to_id("[MASK]") != Some(merged as u32) {
        bail!("[MASK] did not become the last token");
    }
    tokenizer.to_string(false).map_err(|e| anyhow!("cannot write the tokenizer: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use unimo::tokenizer::Tokenizer;

    #[test]
    fn a_trained_tokenizer_reads_back_what_it_spells() {
        let corpus = ["A large red circle .", "a small blue square.", "two dogs run on the beach", "a dog on the beach"];
        let json = train(corpus.into_iter().cycle().take(40), 300).unwrap();
        let tokenizer = Tokenizer::from_bytes(json.as_bytes()).unwrap();
        assert!(tokenizer.vocabulary_size() <= 300);
        for text in ["a red dog", "naïve façade: 25 €", "two squares"] {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text, 100)), text);
        }
        assert_eq!(tokenizer.encode("A DOG.", 100), tokenizer.encode("a dog", 100));
        assert_eq!(json, train(corpus.into_iter().cycle().take(40), 300).unwrap(), "training is deterministic");
    }

    #[test]
    fn impossible_requests_are_refused() {
        assert!(train(["a"].into_iter(), 100).is_err());
        assert!(train(["  ", "."].into_iter(), 300).is_err());
    }
}
