//! Model sizes, read from TOML.

use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::detections::RegionShapes;

/// What of a picture is taken into the unified image–text space.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageEmbedding {
    /// The last hidden state of `[IMG]`, as in the paper.
    #[default]
    Token,
    /// The mean of the standardised features of the visible regions, which is the feature of `[IMG]`: what the layers know by heart
    /// of the training pictures does not reach it.
    Pooled,
}

/// What of a text is taken into the unified image–text space.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TextEmbedding {
    /// The last hidden state of `[CLS]`, as in the paper.
    #[default]
    Token,
    /// That, and beside it the mean of the last hidden states of the tokens behind it, `[SEP]` among them: what a layer that learns
    /// alone finds more in.
    Both,
}

/// The names on the command line, those of TOML; the default's is `token`.
macro_rules! named {
    ($type:ident { Token = "token", $variant:ident = $name:literal }) => {
        impl $type {
            fn is_token(&self) -> bool {
                *self == Self::Token
            }
        }

        impl FromStr for $type {
            type Err = String;

            fn from_str(name: &str) -> Result<Self, String> {
                match name {
                    "token" => Ok(Self::Token),
                    $name => Ok(Self::$variant),
                    _ => Err(format!("{name} is none of token, {}", $name)),
                }
            }
        }
    };
}

named!(ImageEmbedding { Token = "token", Pooled = "pooled" });
named!(TextEmbedding { Token = "token", Both = "both" });

/// Sizes of one model (`model.toml` of a checkpoint).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Name of the size, for people.
    pub name: String,
    /// Width of the hidden states.
    pub hidden: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Attention heads; divides `hidden`.
    pub heads: usize,
    /// Inner width of the feed-forward blocks.
    pub feed_forward: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Learned text positions.
    pub positions: usize,
    /// Width of the unified image–text space.
    pub embedding: usize,
    /// What of a picture is taken there, `token` or `pooled`.
    #[serde(default, skip_serializing_if = "ImageEmbedding::is_token")]
    pub image_embedding: ImageEmbedding,
    /// What of a text is taken there, `token` or `both`.
    #[serde(default, skip_serializing_if = "TextEmbedding::is_token")]
    pub text_embedding: TextEmbedding,
    /// Width of a region's feature.
    pub region_feature: usize,
    /// Classes of a region's soft label.
    pub region_classes: usize,
    /// Cells along a side of the region grid; 0 where regions are detected.
    #[serde(default, skip_serializing_if = "none")]
    pub grid: usize,
    /// Most detected regions of a picture; 0 where regions are the cells of a grid.
    #[serde(default, skip_serializing_if = "none")]
    pub detected_regions: usize,
    /// Dropout rate of embeddings, attention and residual branches.
    pub dropout: f64,
    /// Standard deviation of fresh matrices. The paper's 0.02 suits a width of 768; narrow models learn sooner from more.
    #[serde(default = "papers_deviation")]
    pub initial_deviation: f64,
    /// How much louder than a channel of the backbone each of the twelve colour values of a region starts. Equally loud, they
    /// would be one part in a hundred of what is seen, and colours are learnt late.
    #[serde(default = "default_emphasis")]
    pub colour_emphasis: f64,
    /// Outputs of the head for a downstream task; 0 is no such head.
    #[serde(default, skip_serializing_if = "none")]
    pub task_classes: usize,
}

fn none(count: &usize) -> bool {
    *count == 0
}

fn papers_deviation() -> f64 {
    0.02
}

fn default_emphasis() -> f64 {
    5.0
}

/// The sizes that come with the program, as `(name, TOML)`.
const PRESETS: [(&str, &str); 6] = [
    ("pico", include_str!("../../sizes/pico.toml")),
    ("edge-xs", include_str!("../../sizes/edge-xs.toml")),
    ("edge-s", include_str!("../../sizes/edge-s.toml")),
    ("edge-m", include_str!("../../sizes/edge-m.toml")),
    ("base", include_str!("../../sizes/base.toml")),
    ("large", include_str!("../../sizes/large.toml")),
];

impl ModelConfig {
    /// Parses and checks sizes.
    ///
    /// # Errors
    /// Malformed TOML, unknown keys, sizes that cannot work together.
    pub fn from_toml(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    /// A size that comes with the program (`pico`, `edge-xs`, `edge-s`, `edge-m`, `base`, `large`), or a TOML file.
    ///
    /// # Errors
    /// Neither a known name nor a readable file of sizes.
    pub fn named(name_or_path: &str) -> Result<Self> {
        if let Some((_, text)) = PRESETS.iter().find(|(name, _)| *name == name_or_path) {
            return Self::from_toml(text);
        }
        let path = Path::new(name_or_path);
        if !path.is_file() {
            let known: Vec<_> = PRESETS.iter().map(|(name, _)| *name).collect();
            bail!("`{name_or_path}` is neither a size ({}) nor a file", known.join(", "));
        }
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::from_toml(&text).with_context(|| format!("in {}", path.display()))
    }

    fn check(&self) -> Result<()> {
        if self.heads == 0 || !self.hidden.is_multiple_of(self.heads) {
            bail!("{} heads do not divide a hidden size of {}", self.heads, self.hidden);
        }
        if self.layers == 0 || self.positions < 3 || self.vocabulary < 6 {
            bail!("a model needs layers, at least 3 positions and 6 tokens");
        }
        if (self.grid == 0) == (self.detected_regions == 0) {
            bail!("a model has either a `grid` of regions or `detected_regions`");
        }
        if self.image_embedding == ImageEmbedding::Pooled && self.region_feature == self.hidden {
            bail!(
                "image_embedding is told by its width in a bundle: `pooled` needs a region_feature other than hidden, which is {}",
                self.hidden
            );
        }
        if !(0.0..1.0).contains(&self.dropout) {
            bail!("dropout {} is not in [0, 1)", self.dropout);
        }
        if !(self.initial_deviation > 0.0 && self.initial_deviation < 1.0) {
            bail!("initial_deviation {} is not between 0 and 1", self.initial_deviation);
        }
        if !(self.colour_emphasis > 0.0 && self.colour_emphasis.is_finite()) {
            bail!("colour_emphasis {} is not a positive number", self.colour_emphasis);
        }
        Ok(())
    }

    /// Whether regions are detected rather than the cells of a grid.
    #[must_use]
    pub fn detects(&self) -> bool {
        self.detected_regions > 0
    }

    /// What a table of detected regions must hold.
    #[must_use]
    pub fn region_shapes(&self) -> RegionShapes {
        RegionShapes { features: self.region_feature, classes: self.region_classes, most: self.detected_regions }
    }

    /// Cells of the region grid.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.grid * self.grid
    }

    /// Rows that an image takes: `[IMG]` and the cells of the grid.
    #[must_use]
    pub fn image_tokens(&self) -> usize {
        1 + self.regions()
    }

    /// Width of what `embed.image` takes.
    #[must_use]
    pub fn embedded_width(&self) -> usize {
        match self.image_embedding {
            ImageEmbedding::Token => self.hidden,
            ImageEmbedding::Pooled => self.region_feature,
        }
    }

    /// Width of what `embed.text` takes.
    #[must_use]
    pub fn embedded_text_width(&self) -> usize {
        match self.text_embedding {
            TextEmbedding::Token => self.hidden,
            TextEmbedding::Both => 2 * self.hidden,
        }
    }

    /// Names and shapes of all weights, in a fixed order.
    #[must_use]
    pub fn weights(&self) -> Vec<(String, Vec<usize>)> {
        let (h, f) = (self.hidden, self.feed_forward);
        let mut list: Vec<(String, Vec<usize>)> = Vec::new();
        let linear = |list: &mut Vec<_>, name: &str, out: usize, input: usize| {
            list.push((format!("{name}.weight"), vec![out, input]));
            list.push((format!("{name}.bias"), vec![out]));
        };
        let norm = |list: &mut Vec<_>, name: &str| {
            list.push((format!("{name}.weight"), vec![h]));
            list.push((format!("{name}.bias"), vec![h]));
        };
        list.push(("text.token.weight".into(), vec![self.vocabulary, h]));
        list.push(("text.position.weight".into(), vec![self.positions, h]));
        norm(&mut list, "text.norm");
        linear(&mut list, "image.feature", h, self.region_feature);
        linear(&mut list, "image.box", h, 5);
        norm(&mut list, "image.norm");
        for i in 0..self.layers {
            linear(&mut list, &format!("layers.{i}.attention.qkv"), 3 * h, h);
            linear(&mut list, &format!("layers.{i}.attention.output"), h, h);
            norm(&mut list, &format!("layers.{i}.attention.norm"));
            linear(&mut list, &format!("layers.{i}.ffn.up"), f, h);
            linear(&mut list, &format!("layers.{i}.ffn.down"), h, f);
            norm(&mut list, &format!("layers.{i}.ffn.norm"));
        }
        linear(&mut list, "pool.image", h, h);
        linear(&mut list, "pool.text", h, h);
        linear(&mut list, "embed.image", self.embedding, self.embedded_width());
        linear(&mut list, "embed.text", self.embedding, self.embedded_text_width());
        linear(&mut list, "lm.transform", h, h);
        norm(&mut list, "lm.norm");
        list.push(("lm.bias".into(), vec![self.vocabulary]));
        linear(&mut list, "match", 1, h);
        linear(&mut list, "region.feature", self.region_feature, h);
        linear(&mut list, "region.class", self.region_classes, h);
        list.push(("temperature".into(), vec![]));
        if self.task_classes > 0 {
            linear(&mut list, "task.hidden", h, h);
            linear(&mut list, "task.output", self.task_classes, h);
        }
        list
    }

    /// Number of trained parameters (without the backbone).
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.weights().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_parse_and_carry_their_names() {
        for (name, _) in PRESETS {
            assert_eq!(ModelConfig::named(name).unwrap().name, name);
        }
    }

    #[test]
    fn base_and_large_have_the_papers_shapes() {
        for (name, layers, hidden, heads) in [("base", 12, 768, 12), ("large", 24, 1024, 16)] {
            let c = ModelConfig::named(name).unwrap();
            assert_eq!((c.layers, c.hidden, c.heads, c.feed_forward), (layers, hidden, heads, 4 * hidden));
        }
    }

    /// UNIMO has 127.5 and 359.6 million parameters (arXiv 2012.15409, section 3.1, without the detector). That is what the
    /// embeddings, the layers, the poolings and the language model's head amount to; projections into the unified space and heads
    /// that only pretraining uses come on top.
    #[test]
    fn base_and_large_have_the_papers_parameters() {
        for (name, millions) in [("base", 127.5), ("large", 359.6)] {
            let weights = ModelConfig::named(name).unwrap().weights();
            let extra = ["embed.", "region.", "match.", "temperature"];
            let counted = weights.iter().filter(|(name, _)| !extra.iter().any(|prefix| name.starts_with(prefix)));
            let count: usize = counted.map(|(_, shape)| shape.iter().product::<usize>()).sum();
            let rounded = (count as f64 / 1e5).round() / 10.0;
            assert_eq!(rounded, millions, "{name} has {count}");
        }
    }

    #[test]
    fn embeddings_are_written_only_where_they_are_not_the_papers() {
        let token = ModelConfig::named("edge-xs").unwrap();
        let pooled = ModelConfig::named("edge-s").unwrap();
        assert_eq!([&token, &pooled].map(|c| c.image_embedding), [ImageEmbedding::Token, ImageEmbedding::Pooled]);
        assert_eq!([&token, &pooled].map(|c| c.text_embedding), [TextEmbedding::Token, TextEmbedding::Both]);
        let text = |config: &ModelConfig| toml::to_string(config).unwrap();
        assert!(!text(&token).contains("image_embedding") && !text(&token).contains("text_embedding"), "{}", text(&token));
        assert!(text(&pooled).contains("image_embedding = \"pooled\"\ntext_embedding = \"both\""), "{}", text(&pooled));
        for config in [token, pooled] {
            assert_eq!(ModelConfig::from_toml(&text(&config)).unwrap(), config);
            let width = |layer: &str| config.weights().into_iter().find(|(name, _)| name == layer).map(|(_, shape)| shape[1]);
            let token = config.image_embedding == ImageEmbedding::Token;
            assert_eq!(width("embed.image.weight"), Some(if token { 128 } else { 1292 }));
            assert_eq!(width("embed.text.weight"), Some(if token { 128 } else { 512 }));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let good = PRESETS[0].1;
        for (from, to, says) in [
            ("heads = 2", "heads = 3", "do not divide"),
            ("dropout = 0.0", "dropout = 1.0", "dropout"),
            ("layers = 2", "layers = 2\nwings = 2", "wings"),
            ("grid = 7", "", "either a `grid`"),
            ("grid = 7", "grid = 7\ndetected_regions = 9", "either a `grid`"),
            ("grid = 7", "grid = 7\nimage_embedding = 'mean'", "unknown variant `mean`"),
            ("grid = 7", "grid = 7\ntext_embedding = 'mean'", "unknown variant `mean`"),
            ("region_feature = 1292", "region_feature = 64\nimage_embedding = 'pooled'", "other than hidden, which is 64"),
        ] {
            assert!(good.contains(from));
            let error = format!("{:#}", ModelConfig::from_toml(&good.replace(from, to)).unwrap_err());
            assert!(error.contains(says), "{error}");
        }
    }
}
