//! From a picture's cached record to region features: with a frozen backbone the record holds them, and so it does where regions
//! are detected and there is no backbone; with trained blocks they are computed anew in every step, and gradients flow into those
//! blocks.
//!
//! The first blocks see general edges and textures and cost most of the time; the last ones are the largest and decide what is
//! told apart. Training those alone needs no pixels: a cache keeps what enters the first of them. Where all are trained, the first
//! convolution too, it keeps the pixels.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;

use crate::backbone::{BLOCKS, Backbone, CHANNELS, COLOURS, Convolution, FEATURES, GRID, WHOLE, entering, entering_trained};
use crate::model::ModelConfig;
use crate::ops;
#[cfg(any(feature = "cuda", test))]
use crate::ops::cuda::network::{Forward, Runs};
use crate::ops::network::{Block, Kind, Layer, Network};
use crate::regions::Record;

/// Prefix of the names under which the optimiser knows the backbone's weights.
pub const PREFIX: &str = "backbone.";

/// A backbone, if regions are the cells of its grid, and which of its blocks are trained.
pub struct Vision {
    backbone: Option<Backbone>,
    trained_blocks: usize,
    weights: BTreeMap<String, Var>,
    #[cfg(any(feature = "cuda", test))]
    runs: Runs,
}

impl Vision {
    /// Trains the last `trained_blocks` inverted residual blocks and the head behind them; 0 trains nothing, 18 ([`WHOLE`]) all of them
    /// and the first convolution.
    ///
    /// # Errors
    /// Those of candle.
    pub fn new(backbone: Backbone, trained_blocks: usize, device: &Device) -> Result<Self> {
        let mut weights = BTreeMap::new();
        for name in trained_layers(trained_blocks) {
            let Convolution { weight, bias } = backbone.layer(&name);
            let rows = if name.ends_with("depthwise") { 9 } else { bias.len() };
            let shape = (rows, weight.len() / rows);
            weights.insert(format!("{PREFIX}{name}.weight"), Var::from_slice(weight, shape, device)?);
            weights.insert(format!("{PREFIX}{name}.bias"), Var::from_slice(bias, bias.len(), device)?);
        }
        let mut vision = Self::detected();
        (vision.backbone, vision.trained_blocks, vision.weights) = (Some(backbone), trained_blocks, weights);
        Ok(vision)
    }

    /// For regions that were detected elsewhere.
    #[must_use]
    pub fn detected() -> Self {
        Self {
            backbone: None,
            trained_blocks: 0,
            weights: BTreeMap::new(),
            #[cfg(any(feature = "cuda", test))]
            runs: Runs::default(),
        }
    }

    /// That of a checkpoint with this model, nothing of it trained.
    ///
    /// # Errors
    /// A backbone that cannot be read.
    pub fn of_checkpoint(folder: &Path, config: &ModelConfig, device: &Device) -> Result<Self> {
        if config.detects() {
            return Ok(Self::detected());
        }
        Self::new(Backbone::load(&folder.join("backbone.safetensors"))?, 0, device)
    }

    /// The trained weights by name, as the kernels want them: pointwise `[out, in]`, depthwise `[9, channels]`.
    #[must_use]
    pub fn weights(&self) -> &BTreeMap<String, Var> {
        &self.weights
    }

    /// Number of trained blocks.
    #[must_use]
    pub fn trained_blocks(&self) -> usize {
        self.trained_blocks
    }

    /// Multiplications of one picture's trained layers.
    #[must_use]
    pub fn multiplications(&self) -> f64 {
        if self.trained_blocks == 0 {
            return 0.0;
        }
        let (first, stem) = (BLOCKS.len().saturating_sub(self.trained_blocks), entering(0));
        let mut sum = if self.trained_blocks == WHOLE { stem.1 * stem.1 * stem.0 * 27 } else { 0 };
        for (i, &(out, expansion, stride)) in BLOCKS.iter().enumerate().skip(first) {
            let (channels, side) = entering(i);
            let (inner, before, after) = (channels * expansion, side * side, (side / stride) * (side / stride));
            sum += if expansion > 1 { before * channels * inner } else { 0 } + after * inner * (9 + out);
        }
        (sum + GRID * GRID * entering(BLOCKS.len()).0 * CHANNELS) as f64
    }

    /// The backbone as it was given, untrained.
    ///
    /// # Errors
    /// There is none: regions are detected elsewhere.
    pub fn given(&self) -> Result<&Backbone> {
        self.backbone.as_ref().context("a model of detected regions has no backbone")
    }

    /// The backbone with the trained weights as they are now, and then without its classifier.
    ///
    /// # Errors
    /// Those of candle.
    pub fn current(&self) -> Result<Backbone> {
        let mut backbone = self.given()?.clone();
        if self.trained_blocks > 0 {
            backbone.forget_classifier();
        }
        for name in trained_layers(self.trained_blocks) {
            let values = |kind: &str| self.weights[&format!("{PREFIX}{name}.{kind}")].as_tensor().flatten_all()?.to_vec1();
            backbone.set_layer(&name, Convolution { weight: values("weight")?, bias: values("bias")? });
        }
        Ok(backbone)
    }

    /// The records with region features as their values, computed without gradients where the backbone is trained.
    ///
    /// # Errors
    /// Those of candle.
    pub fn regions(&self, records: Vec<Record>) -> Result<Vec<Record>> {
        if self.trained_blocks == 0 {
            return Ok(records);
        }
        let backbone = self.current()?;
        Ok(records.par_iter().map(|record| Record::grid(backbone.regions(&record.values, self.trained_blocks))).collect())
    }

    /// The pictures of records, put where regions are to be computed from them.
    ///
    /// # Errors
    /// Those of candle.
    ///
    /// # Panics
    /// When no block is trained, or a record has another length than such records have.
    pub fn place(&self, records: &[&[f32]], device: &Device) -> Result<Pictures> {
        let (channels, side) = entering_trained(self.trained_blocks);
        let cut = side * side * channels;
        let activations = records.iter().flat_map(|r| &r[..cut]).copied().collect();
        let colours = records.iter().flat_map(|r| &r[cut..]).copied().collect();
        Ok(Pictures {
            activations: ops::from_host(activations, (records.len(), side * side, channels), device)?,
            colours: ops::from_host(colours, (records.len(), GRID * GRID, COLOURS), device)?,
        })
    }

    /// Region features `[pictures, 49, 1292]`, and how gradients by them are taken back to the trained weights.
    ///
    /// # Errors
    /// Those of candle.
    pub fn see(&self, pictures: &Pictures) -> Result<Seen> {
        #[cfg(any(feature = "cuda", test))]
        if ops::cuda::works_on(pictures.colours.device()) {
            let (features, forward) = self.runs.forward(&self.network()?, &pictures.activations)?;
            let regions = Var::from_tensor(&with_colours(&features, pictures)?)?;
            return Ok(Seen { regions: regions.as_tensor().clone(), cut: Some((regions, forward)) });
        }
        let features = self.network()?.run(&pictures.activations)?;
        Ok(Seen::tracked(with_colours(&features, pictures)?))
    }

    /// In how many ways passes through the part that is trained are recorded.
    #[cfg(test)]
    pub fn recorded(&self) -> usize {
        self.runs.recorded()
    }

    /// The part that is trained.
    fn network(&self) -> candle_core::Result<Network> {
        let layer = |name: &str, kind: Kind| {
            let tensor = |of: &str| self.weights[&format!("{PREFIX}{name}.{of}")].as_tensor().clone();
            Layer { kind, weight: tensor("weight"), bias: tensor("bias") }
        };
        let alone = |name: &str, kind: Kind| Block { layers: vec![layer(name, kind)], residual: false };
        let (mut blocks, first) = (Vec::new(), BLOCKS.len().saturating_sub(self.trained_blocks));
        if self.trained_blocks == WHOLE {
            blocks.push(alone("stem", Kind::Convolution { stride: 2 }));
        }
        let (mut channels, _) = entering(first);
        for (i, &(out, expansion, stride)) in BLOCKS.iter().enumerate().skip(first) {
            let part = |name: &str, kind: Kind| layer(&format!("block{i}.{name}"), kind);
            let expand = (expansion > 1).then(|| part("expand", Kind::Pointwise { activated: true }));
            let others = [part("depthwise", Kind::Depthwise { stride }), part("project", Kind::Pointwise { activated: false })];
            blocks.push(Block { layers: expand.into_iter().chain(others).collect(), residual: stride == 1 && channels == out });
            channels = out;
        }
        blocks.push(alone("head", Kind::Pointwise { activated: true }));
        Network::new(blocks)
    }
}

fn with_colours(features: &Tensor, pictures: &Pictures) -> Result<Tensor> {
    debug_assert_eq!(features.dims(), [pictures.count(), GRID * GRID, CHANNELS]);
    let regions = Tensor::cat(&[features, &pictures.colours], 2)?;
    debug_assert_eq!(regions.dims()[2], FEATURES);
    Ok(regions)
}

/// Pictures of a pass with a trained backbone (see [`Vision::place`]).
pub struct Pictures {
    /// What enters the part that is trained, `[pictures, pixels, channels]`.
    activations: Tensor,
    /// Mean colours of the cells' quarters, `[pictures, 49, 12]`.
    colours: Tensor,
}

impl Pictures {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.colours.dims()[0]
    }
}

/// Region features that were computed for a pass.
pub struct Seen {
    /// `[pictures, 49, 1292]`
    pub regions: Tensor,
    /// Where candle's way back ends, and what goes on from there on the kernels for CUDA devices.
    #[cfg(any(feature = "cuda", test))]
    cut: Option<(Var, Forward)>,
}

impl Seen {
    /// Features through which candle takes gradients back to the trained weights.
    fn tracked(regions: Tensor) -> Self {
        Self {
            regions,
            #[cfg(any(feature = "cuda", test))]
            cut: None,
        }
    }

    /// What candle is to take gradients by beside weights.
    #[must_use]
    pub fn leaf(&self) -> Option<&Var> {
        #[cfg(any(feature = "cuda", test))]
        return self.cut.as_ref().map(|(leaf, _)| leaf);
        #[cfg(not(any(feature = "cuda", test)))]
        None
    }

    /// Takes the gradient by [`Self::leaf`], if there is one, on to the trained weights of `vision`, which has seen `pictures`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn backward(&self, vision: &Vision, pictures: &Pictures, all: &mut GradStore) -> candle_core::Result<()> {
        #[cfg(any(feature = "cuda", test))]
        if let Some((leaf, forward)) = &self.cut
            && let Some(gradient) = all.remove(leaf)
        {
            let by_features = gradient.narrow(2, 0, CHANNELS)?;
            let network = vision.network()?;
            let by_weights = vision.runs.backward(&network, &pictures.activations, forward, &by_features)?;
            for (weight, gradient) in network.weights().zip(by_weights) {
                all.insert(weight, gradient);
            }
        }
        #[cfg(not(any(feature = "cuda", test)))]
        let _ = (vision, pictures, all);
        Ok(())
    }
}

/// Layers of the last `blocks` blocks and the head; none for 0.
fn trained_layers(blocks: usize) -> Vec<String> {
    if blocks == 0 {
        return Vec::new();
    }
    let of_block = |(i, &(_, expansion, _)): (usize, &(usize, usize, usize))| {
        let parts: &[&str] = if expansion > 1 { &["expand", "depthwise", "project"] } else { &["depthwise", "project"] };
        parts.iter().map(move |part| format!("block{i}.{part}"))
    };
    let of_blocks = BLOCKS.iter().enumerate().skip(BLOCKS.len().saturating_sub(blocks)).flat_map(of_block);
    let stem = (blocks == WHOLE).then(|| "stem".to_owned());
    stem.into_iter().chain(of_blocks).chain(["head".to_owned()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbone::{INPUT, random_file};

    fn records(backbone: &Backbone, blocks: usize) -> Vec<Vec<f32>> {
        let pixels = |phase: f32| (0..3 * INPUT * INPUT).map(|i| (i as f32 * 0.37 + phase).sin()).collect::<Vec<f32>>();
        [0.0, 1.0].map(|phase| backbone.record(&pixels(phase), blocks).unwrap()).to_vec()
    }

    fn plain(vision: &Vision, records: &[Vec<f32>]) -> Vec<Vec<f32>> {
        let records = records.iter().cloned().map(Record::grid).collect();
        vision.regions(records).unwrap().into_iter().map(|record| record.values).collect()
    }

    fn differentiable(vision: &Vision, records: &[Vec<f32>]) -> Tensor {
        let records: Vec<&[f32]> = records.iter().map(Vec::as_slice).collect();
        vision.see(&vision.place(&records, &Device::Cpu).unwrap()).unwrap().regions
    }

    fn gradients(vision: &Vision, records: &[Vec<f32>]) -> candle_core::backprop::GradStore {
        let regions = differentiable(vision, records);
        regions.narrow(2, 0, CHANNELS).unwrap().sqr().unwrap().mean_all().unwrap().backward().unwrap()
    }

    #[test]
    fn training_and_inference_see_the_same_regions_and_every_trained_weight_has_a_gradient() {
        let backbone = Backbone::from_bytes(&random_file(3).unwrap()).unwrap();
        for blocks in [1, 4, 17, WHOLE] {
            let vision = Vision::new(backbone.clone(), blocks, &Device::Cpu).unwrap();
            let records = records(&backbone, blocks);
            let trained = differentiable(&vision, &records).to_vec3::<f32>().unwrap();
            let plain = plain(&vision, &records);
            for (trained, plain) in trained.iter().zip(&plain) {
                // Sums of up to 960 products of order 1 in f32, in another order.
                assert!(trained.iter().flatten().zip(plain).all(|(a, b)| (a - b).abs() < 1e-3), "{blocks} blocks");
            }
            let gradients = gradients(&vision, &records);
            for (name, var) in vision.weights() {
                let gradient = gradients.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
                let norm = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(norm.is_finite() && norm > 0.0, "{name}: {norm}");
            }
        }
    }

    #[test]
    fn multiplications_are_those_of_the_network() {
        // MobileNetV2 1.0 has 300 million (Sandler et al., arXiv 1801.04381, table 4), the stem's 10.8 million and the
        // classifier's 1.3 million among them, which is not trained here.
        let millions = |blocks: usize| {
            let backbone = Backbone::from_bytes(&random_file(3).unwrap()).unwrap();
            Vision::new(backbone, blocks, &Device::Cpu).unwrap().multiplications() / 1e6
        };
        assert!((millions(WHOLE) + 1.3 - 300.0).abs() < 2.0, "{}", millions(WHOLE));
        assert!((millions(WHOLE) - millions(17) - 10.8).abs() < 0.1, "{}", millions(17));
    }

    #[test]
    fn what_was_trained_is_what_the_current_backbone_computes() {
        let backbone = Backbone::from_bytes(&random_file(3).unwrap()).unwrap();
        let vision = Vision::new(backbone.clone(), 2, &Device::Cpu).unwrap();
        let records = records(&backbone, 2);
        let before = plain(&vision, &records);
        let gradients = gradients(&vision, &records);
        for var in vision.weights().values() {
            var.set(&(var.as_tensor() - (gradients.get(var).unwrap() * 0.1).unwrap()).unwrap()).unwrap();
        }
        let after = plain(&vision, &records);
        let energy = |regions: &[Vec<f32>]| {
            regions.iter().flat_map(|r| r.chunks_exact(FEATURES)).flat_map(|f| &f[..CHANNELS]).map(|v| v * v).sum::<f32>()
        };
        assert!(energy(&after) < energy(&before), "{} is not below {}", energy(&after), energy(&before));
        assert_eq!(vision.given().unwrap(), &backbone);
        assert_ne!(vision.current().unwrap(), backbone);
    }
}
