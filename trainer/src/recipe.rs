//! Training recipes: what a step is made of, as TOML.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::backbone::WHOLE;
use crate::optimizer::OptimizerConfig;

/// A whole recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Steps in all.
    pub steps: u64,
    /// Step after which training ends, where the learning rate is planned for more `steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends_at: Option<u64>,
    /// Seed of every draw.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// Views of each picture kept in the feature cache: 1 as it is, 2 with a mirrored one, then random crops. Detected regions have
    /// one, as they are.
    #[serde(default = "default_views")]
    pub views: usize,
    /// Last residual blocks of the backbone that are trained with the model, its head with them; 0 leaves the backbone as it is, 18
    /// trains its first convolution too.
    #[serde(default)]
    pub trained_blocks: usize,
    /// Share of the activations dropped while training, instead of the model's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// Share of a picture's mean feature that is dropped before it is embedded, where it is pooled, instead of `dropout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feature_dropout: Option<f64>,
    /// Beginnings of the names of the weights that are trained, such as `embed.`; the others stay as they are, to the last bit.
    /// Without any, all are trained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trained: Vec<String>,
    /// Steps between checkpoints.
    #[serde(default = "default_interval")]
    pub checkpoint_every: u64,
    /// Steps between evaluations on the development shards.
    #[serde(default = "default_interval")]
    pub evaluate_every: u64,
    /// Development pictures evaluated on the way.
    #[serde(default = "default_evaluated")]
    pub evaluate_images: usize,
    /// What a step holds.
    pub batch: BatchConfig,
    /// Weights of the losses.
    #[serde(default)]
    pub weights: LossWeights,
    /// Optimiser.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
}

fn none(count: &usize) -> bool {
    *count == 0
}
fn plain_temperature() -> f64 {
    1.0
}
fn one_chunk() -> usize {
    1
}
fn default_seed() -> u64 {
    1
}
fn default_views() -> usize {
    2
}
fn default_interval() -> u64 {
    200
}
fn default_evaluated() -> usize {
    100
}

/// How many of each a step holds. Zero leaves an objective out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConfig {
    /// Passes that a step is cut into. More than one hold memory to one pass's activations, whatever the size of the step and its
    /// contrasts, for a second forward pass over what is contrasted; the gradients are the same.
    #[serde(default = "one_chunk")]
    pub chunks: usize,
    /// Pictures with captions.
    pub images: usize,
    /// Share of each picture's regions that is hidden from the model while it writes, matches and is contrasted: with few
    /// pictures, a guard against learning them by heart.
    #[serde(default)]
    pub hidden_regions: f64,
    /// Captions of each picture that the language model learns to write; they share one image prefix.
    pub captions: usize,
    /// Captions of each picture drawn from the model itself and rewarded by CIDEr-D (self-critical training).
    #[serde(default)]
    pub sampled_captions: usize,
    /// What the logits are divided by when captions are drawn, and in the likelihood that is then moved: below 1 the draws are
    /// nearer to what beam search decodes.
    #[serde(default = "plain_temperature")]
    pub sampling_temperature: f64,
    /// Captions of each picture encoded alone for the contrast.
    #[serde(default)]
    pub contrast_captions: usize,
    /// Further pictures, each with one of its captions, that take part in the contrast alone (not in `cross_modal`): the picture by
    /// the mean of its features, the caption encoded alone. They cost little and give every picture and caption more to be told from.
    /// For models whose image embedding is pooled.
    #[serde(default, skip_serializing_if = "none")]
    pub contrast_pairs: usize,
    /// Pictures encoded jointly with their own and with wrong captions.
    #[serde(default)]
    pub match_images: usize,
    /// Wrong captions (TF-IDF neighbours) of each of those.
    #[serde(default)]
    pub match_negatives: usize,
    /// Captions of each of those rewritten to be false (needs --rewrites).
    #[serde(default)]
    pub match_rewrites: usize,
    /// Captions of other pictures from the sentence level of rewrites, of each of those (needs --rewrites).
    #[serde(default)]
    pub match_sentences: usize,
    /// Captions of each of those in other words, as positives (needs --rewrites made with --paraphrases).
    #[serde(default)]
    pub match_paraphrases: usize,
    /// Pictures that bring what was retrieved for them from images alone and texts alone (needs --retrieved), as positives of the
    /// cross-modal contrast.
    #[serde(default)]
    pub retrieved_pairs: usize,
    /// Retrieved images of each of those.
    #[serde(default)]
    pub retrieved_images: usize,
    /// Retrieved texts of each of those.
    #[serde(default)]
    pub retrieved_texts: usize,
    /// Pairs encoded jointly with text or regions masked, in turn.
    #[serde(default)]
    pub masked_pairs: usize,
    /// Pairs of which a quarter of the caption is taken out, to be written after what is left and the picture.
    #[serde(default)]
    pub fragment_pairs: usize,
    /// Examples of a downstream task.
    #[serde(default)]
    pub task_examples: usize,
    /// Texts alone: generated and unmasked, in turn.
    #[serde(default)]
    pub texts: usize,
    /// Texts alone of which a quarter is taken out, to be written after what is left.
    #[serde(default)]
    pub fragment_texts: usize,
    /// Pictures alone, with masked regions.
    #[serde(default)]
    pub images_alone: usize,
}

/// Weights of the losses in the sum that is minimised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossWeights {
    /// Caption generation.
    pub caption: f64,
    /// Reward of sampled captions.
    pub self_critical: f64,
    /// Generation of texts alone.
    pub text: f64,
    /// Generation of fragments taken out of texts.
    pub fragments: f64,
    /// Contrast of separately encoded images and texts.
    pub contrast: f64,
    /// Cross-modal contrast over jointly encoded (own, rewritten, retrieved) and separately encoded pairs together, the paper's
    /// equation 1. The score of a joint pair is its matching logit, that of a separate one its cosine over the temperature.
    pub cross_modal: f64,
    /// Matching of jointly encoded pairs.
    pub matching: f64,
    /// Masked words.
    pub masked_language: f64,
    /// Masked regions: feature regression.
    pub region_features: f64,
    /// Masked regions: soft labels.
    pub region_classes: f64,
    /// A downstream task.
    pub task: f64,
    /// Label smoothing of generation.
    pub label_smoothing: f64,
}

impl Default for LossWeights {
    fn default() -> Self {
        Self {
            caption: 1.0,
            self_critical: 1.0,
            text: 0.5,
            fragments: 0.5,
            contrast: 1.0,
            cross_modal: 0.0,
            matching: 0.5,
            masked_language: 0.5,
            region_features: 0.5,
            region_classes: 0.1,
            task: 1.0,
            label_smoothing: 0.1,
        }
    }
}

impl Recipe {
    /// The step after which training ends.
    #[must_use]
    pub fn last_step(&self) -> u64 {
        self.ends_at.unwrap_or(self.steps)
    }

    /// Whether there is a checkpoint after so many steps.
    #[must_use]
    pub fn saves_at(&self, step: u64) -> bool {
        step.is_multiple_of(self.checkpoint_every) || step == self.last_step()
    }

    /// Whether the development data are judged after so many steps.
    #[must_use]
    pub fn judges_at(&self, step: u64) -> bool {
        step.is_multiple_of(self.evaluate_every) || step == self.last_step()
    }

    /// Parses and checks a recipe.
    ///
    /// # Errors
    /// Malformed TOML, unknown keys, numbers that make no sense.
    pub fn from_toml(text: &str) -> Result<Self> {
        let recipe: Self = toml::from_str(text)?;
        let b = &recipe.batch;
        if recipe.steps == 0 || recipe.views == 0 || recipe.checkpoint_every == 0 || recipe.evaluate_every == 0 {
            bail!("steps, views, checkpoint_every and evaluate_every must be at least 1");
        }
        if let Some(end) = recipe.ends_at.filter(|end| !(1..=recipe.steps).contains(end)) {
            bail!("ends_at {end} is not one of the {} steps", recipe.steps);
        }
        if b.images + b.contrast_pairs + b.texts + b.fragment_texts + b.images_alone + b.task_examples == 0 {
            bail!("the batch is empty");
        }
        if b.match_images.max(b.masked_pairs).max(b.fragment_pairs).max(b.retrieved_pairs) > b.images {
            bail!("match_images, masked_pairs, fragment_pairs and retrieved_pairs are taken from the step's {} images", b.images);
        }
        let most = b.images.max(b.contrast_pairs).max(b.task_examples).max(1);
        if b.chunks == 0 || b.chunks > most {
            bail!("a step of {} images is cut into 1 to {most} chunks, not {}", b.images, b.chunks);
        }
        if b.retrieved_pairs > 0 && (b.retrieved_images + b.retrieved_texts == 0 || recipe.weights.cross_modal == 0.0) {
            bail!("retrieved_pairs need retrieved_images or retrieved_texts, and the weight cross_modal, which alone uses them");
        }
        if b.contrast_captions > 0 && b.images < 2 {
            bail!("a contrast needs at least 2 images in a step");
        }
        recipe.check_contrast_pairs()?;
        if !(0.0..1.0).contains(&b.hidden_regions) {
            bail!("hidden_regions {} is not in [0, 1)", b.hidden_regions);
        }
        for (name, share) in [("dropout", recipe.dropout), ("feature_dropout", recipe.feature_dropout)] {
            if let Some(share) = share.filter(|share| !(0.0..1.0).contains(share)) {
                bail!("{name} {share} is not in [0, 1)");
            }
        }
        if recipe.trained_blocks > WHOLE {
            bail!("the backbone has {WHOLE} blocks to train, its first convolution among them, not {}", recipe.trained_blocks);
        }
        if recipe.trained_blocks > 0 && (b.masked_pairs > 0 || b.images_alone > 0) {
            bail!(
                "masked regions are learnt from a backbone that stays as it is: trained_blocks needs masked_pairs and images_alone 0"
            );
        }
        if recipe.trained_blocks > 0 && !recipe.trained.is_empty() {
            bail!("`trained` names all that is trained, and the backbone is not among it: it needs trained_blocks 0");
        }
        if b.sampled_captions == 1 {
            bail!("sampled_captions are judged against each other: at least 2 are needed, or 0");
        }
        if !(b.sampling_temperature > 0.0 && b.sampling_temperature.is_finite()) {
            bail!("sampling_temperature {} is not a positive number", b.sampling_temperature);
        }
        if !(0.0..1.0).contains(&recipe.weights.label_smoothing) {
            bail!("label_smoothing is not in [0, 1)");
        }
        Ok(recipe)
    }

    fn check_contrast_pairs(&self) -> Result<()> {
        let b = &self.batch;
        if b.contrast_pairs == 0 {
            return Ok(());
        }
        if self.weights.contrast <= 0.0 {
            bail!("contrast_pairs take part in the contrast alone, whose weight is {}", self.weights.contrast);
        }
        if self.trained_blocks > 0 {
            bail!("contrast_pairs are seen by a backbone that stays as it is: they need trained_blocks 0");
        }
        if b.contrast_pairs + if b.contrast_captions > 0 { b.images } else { 0 } < 2 {
            bail!("a single one of contrast_pairs has nothing to be told from");
        }
        Ok(())
    }

    /// Reads a recipe file.
    ///
    /// # Errors
    /// As [`Recipe::from_toml`].
    pub fn from_file(path: &std::path::Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the recipe {}", path.display()))?;
        Self::from_toml(&text).with_context(|| format!("in {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_without_further_pairs_is_written_as_ever() {
        let plain = "steps = 10\n[batch]\nimages = 4\ncaptions = 5\n";
        let written = |text: &str| toml::to_string(&Recipe::from_toml(text).unwrap()).unwrap();
        assert!(!written(plain).contains("contrast_pairs"));
        assert!(written(&format!("{plain}contrast_pairs = 3\n")).contains("contrast_pairs = 3"));
        // As is one that trains everything.
        assert!(!written(plain).contains("trained ="));
        assert!(
            written(&format!("trained = ['embed.', 'temperature']\n{plain}")).contains("trained = [\"embed.\", \"temperature\"]")
        );
        // A step of nothing else.
        let alone = "steps = 10\n[batch]\nimages = 0\ncaptions = 0\nchunks = 6\ncontrast_pairs = 6\n";
        assert_eq!(Recipe::from_toml(alone).unwrap().batch.contrast_pairs, 6);
    }

    #[test]
    fn the_recipe_of_embeddings_alone_is_nothing_but_a_contrast_of_pairs() {
        let recipe = Recipe::from_toml(include_str!("../recipes/finetune-embeddings.toml")).unwrap();
        assert_eq!((recipe.batch.images, recipe.batch.contrast_pairs, recipe.trained.len()), (0, 1024, 2));
    }

    #[test]
    fn nonsense_is_refused_with_its_reason() {
        let good = "steps = 10\n[batch]\nimages = 4\ncaptions = 5\n";
        assert_eq!(Recipe::from_toml(good).unwrap().weights, LossWeights::default());
        for (change, says) in [
            ("match_images = 5", "taken from"),
            ("sampled_captions = 1", "against each other"),
            ("wings = 2", "wings"),
            ("hidden_regions = 1.0", "hidden_regions"),
            ("chunks = 5", "1 to 4 chunks"),
            ("retrieved_pairs = 2\nretrieved_texts = 1", "cross_modal"),
            ("contrast_pairs = 2\n[weights]\ncontrast = 0.0", "whose weight is 0"),
            ("contrast_pairs = 1", "nothing to be told from"),
            ("[weights]\nlabel_smoothing = 1.5", "label_smoothing"),
        ] {
            let error = format!("{:#}", Recipe::from_toml(&format!("{good}{change}\n")).unwrap_err());
            assert!(error.contains(says), "{error}");
        }
        for (first, last, says) in [
            ("dropout = 1.0", "", "dropout 1"),
            ("feature_dropout = -0.1", "", "feature_dropout -0.1"),
            ("ends_at = 11", "", "ends_at 11"),
            ("trained_blocks = 19", "", "18 blocks"),
            ("trained_blocks = 2", "masked_pairs = 1", "stays as it is"),
            ("trained_blocks = 2", "contrast_pairs = 8", "they need trained_blocks 0"),
            ("trained_blocks = 2\ntrained = ['embed.']", "", "it needs trained_blocks 0"),
        ] {
            let error = format!("{:#}", Recipe::from_toml(&format!("{first}\n{good}{last}\n")).unwrap_err());
            assert!(error.contains(says), "{error}");
        }
    }
}
