//! Options of commands that write captions.

use clap::Args;
use unimo::captioning::DecodeOptions;
use unimo::model::Model;

use super::exit::UsageError;

/// How captions are decoded.
#[derive(Debug, Args)]
pub struct DecodeArgs {
    /// Beginnings kept while writing; 1 is fastest [default: the bundle's]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u8).range(1..=64))]
    beam: Option<u8>,
    /// Most tokens of a caption [default: the bundle's]
    #[arg(long, value_name = "N")]
    max_len: Option<usize>,
}

impl DecodeArgs {
    /// The model's own, with what was asked for in their place.
    pub fn options(&self, model: &Model) -> Result<DecodeOptions, UsageError> {
        let mut options = model.decode_options();
        if let Some(beam) = self.beam {
            options.beam = usize::from(beam);
        }
        if let Some(words) = self.max_len {
            let most = model.manifest().model.max_text - 1;
            if !(1..=most).contains(&words) {
                return Err(UsageError(format!("--max-len {words}: captions of this model have 1 to {most} tokens")));
            }
            options.max_words = words;
        }
        Ok(options)
    }
}
