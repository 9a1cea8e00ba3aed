//! What a bundle is worth on development data, measured through the runtime, and what a precision may cost.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use image::RgbImage;
use unimo::bundle::BundleSource;
use unimo::bundle::manifest::{Form, Precision};
use unimo::engine::{EngineKind, EngineOptions};
use unimo::model::{GraphName, Model};
use unimo::ordered::ordered_map;
use unimo_train::metrics::{caption_scores, recall_at_k};

/// Figures by their names in the manifest.
pub type Figures = BTreeMap<String, f64>;

/// The figures that a precision may not lose.
pub const GATED: [&str; 3] = ["cider", "image_to_text_r1", "text_to_image_r1"];

/// Pictures and their captions.
#[derive(Debug)]
pub struct Development {
    pictures: Vec<RgbImage>,
    captions: Vec<Vec<String>>,
}

impl Development {
    /// Reads shards; records without a readable picture or a caption are left out, with a word on standard error.
    ///
    /// # Errors
    /// Shards that cannot be read, or hold fewer than two pictures with captions: CIDEr and recall need others to compare with.
    pub fn read(shards: &[PathBuf], limit: usize) -> Result<Self> {
        let (mut pictures, mut captions) = (Vec::new(), Vec::new());
        let report = unimo_train::shards::read_shards(shards, |sample| {
            if let (true, Some(bytes), false) = (pictures.len() < limit, &sample.image, sample.captions.is_empty()) {
                pictures.push(unimo::image::decode(bytes, &Default::default())?);
                captions.push(sample.captions);
            }
            Ok(())
        })?;
        for damage in &report.damaged {
            eprintln!("skipped: {} in {}: {}", damage.key, damage.shard.display(), damage.reason);
        }
        if pictures.len() < 2 {
            bail!("the shards given with --measure hold {} pictures with captions; at least 2 are needed", pictures.len());
        }
        Ok(Self { pictures, captions })
    }

    /// Number of pictures.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pictures.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pictures.is_empty()
    }

    /// Captions, embeds and scores everything with one form of a precision of a bundle, as the bundle decodes by default, on an
    /// engine (ONNX Runtime: `library`, or the one that is found). `progress` is called with the number of pictures done.
    ///
    /// # Errors
    /// Those of the runtime.
    pub fn measure(
        &self,
        bundle: &Path,
        (precision, form, engine): (Precision, Form, EngineKind),
        library: Option<&Path>,
        progress: &dyn Fn(u64),
    ) -> Result<Figures> {
        let library = library.map(Path::to_path_buf);
        let options = EngineOptions { engine, precision: Some(precision), form: Some(form), library, ..EngineOptions::default() };
        let model = Model::open(&BundleSource::Path(bundle.to_path_buf()), &options)?;
        model.load(&[GraphName::Vision, GraphName::Decode, GraphName::Text])?;
        let (decoding, workers) = (model.decode_options(), std::thread::available_parallelism().map_or(1, usize::from));
        let (mut written, mut images, mut texts) = (Vec::new(), Vec::new(), Vec::new());
        let work = |(picture, captions): (&RgbImage, &Vec<String>)| -> Result<_> {
            let vision = model.see(picture)?;
            let caption = model.caption(&vision, &decoding)?.text;
            let texts = captions.iter().map(|caption| model.embed_text(caption)).collect::<Result<Vec<_>, _>>()?;
            Ok((caption, vision.embedding, texts))
        };
        ordered_map(self.pictures.iter().zip(&self.captions), workers, work, |done: Result<_>| {
            let (caption, image, of_captions) = done?;
            written.push(caption);
            images.push(image);
            texts.extend(of_captions);
            progress(1);
            anyhow::Ok(())
        })?;
        let image_of_text: Vec<usize> = self.captions.iter().enumerate().flat_map(|(i, all)| vec![i; all.len()]).collect();
        let (scores, recall) = (caption_scores(&written, &self.captions), recall_at_k(&images, &texts, &image_of_text));
        let mut figures = Figures::from([
            ("images".to_owned(), self.len() as f64),
            ("cider".to_owned(), scores.cider),
            ("bleu_4".to_owned(), scores.bleu[3]),
            ("rouge_l".to_owned(), scores.rouge_l),
        ]);
        for (direction, recall) in [("image_to_text", recall.image_to_text), ("text_to_image", recall.text_to_image)] {
            for (k, value) in unimo_train::metrics::RECALL_AT.iter().zip(recall) {
                figures.insert(format!("{direction}_r{k}"), value);
            }
        }
        for value in figures.values_mut() {
            *value = (*value * 1e4).round() / 1e4;
        }
        Ok(figures)
    }
}

/// The largest loss that a precision may bring, as a share of each figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MaxDrop(pub f64);

impl FromStr for MaxDrop {
    type Err = String;

    /// `1%` or `0.01`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 0.01));
        match number.trim().parse::<f64>() {
            Ok(share) if (0.0..=1.0).contains(&(share * unit)) => Ok(Self(share * unit)),
            _ => Err(format!("{text} is neither a share between 0 and 1 nor a percentage, such as 1%")),
        }
    }
}

impl fmt::Display for MaxDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", (self.0 * 1e6).round() / 1e4)
    }
}

impl MaxDrop {
    /// Whether the figures of a precision or form (`what`) lose no more than this against the reference's.
    ///
    /// # Errors
    /// A figure that loses more, or is missing.
    pub fn check(self, what: &str, figures: &Figures, reference: &Figures) -> Result<()> {
        for name in GATED {
            let find = |figures: &Figures| figures.get(name).copied().with_context(|| format!("`{name}` was not measured"));
            let (found, reference) = (find(figures)?, find(reference)?);
            if found < reference * (1.0 - self.0) {
                let drop = 100.0 * (1.0 - found / reference);
                bail!(
                    "{what} loses {drop:.1} % of {name} ({found:.4} instead of {reference:.4}), more than the {self} that \
                     --max-drop allows"
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_shares_of_each_figure() {
        let figures = |cider: f64, r1: f64| Figures::from(GATED.map(|n| (n.to_owned(), if n == "cider" { cider } else { r1 })));
        let (reference, one) = (figures(0.5, 0.1), "1%".parse::<MaxDrop>().unwrap());
        assert!(one.check("i8", &figures(0.4951, 0.0991), &reference).is_ok());
        assert!(one.check("i8", &figures(0.6, 0.2), &reference).is_ok());
        let error = one.check("i8", &figures(0.4949, 0.1), &reference).unwrap_err().to_string();
        assert!(error.starts_with("i8 loses 1.0 % of cider (0.4949 instead of 0.5000)"), "{error}");
        let error = one.check("i8", &figures(0.5, 0.09), &reference).unwrap_err().to_string();
        assert!(error.contains("10.0 % of image_to_text_r1"), "{error}");
        assert!(one.check("i8", &Figures::new(), &reference).is_err());
    }

    #[test]
    fn drops_are_written_as_shares_or_percentages() {
        assert_eq!("0.02".parse(), Ok(MaxDrop(0.02)));
        assert_eq!("2.5 %".parse::<MaxDrop>().unwrap().to_string(), "2.5%");
        assert_eq!(MaxDrop(0.07).to_string(), "7%");
        for wrong in ["", "%", "-1%", "101%", "1.5", "lots", "nan"] {
            assert!(wrong.parse::<MaxDrop>().is_err(), "{wrong}");
        }
    }
}
