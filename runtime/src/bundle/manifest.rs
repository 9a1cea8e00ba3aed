//! `manifest.toml`: what a bundle says about itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::BundleFault;
use crate::image::ImagePreparation;

/// The manifest's version that this crate writes and reads. In version 1 the `decode` graph read one hypothesis at a time.
pub const SCHEMA: u32 = 2;

/// File beside a precision's graphs that holds the weights of all of them.
pub const WEIGHTS: &str = "weights.bin";

/// How the weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// 16-bit floats, expanded when loaded.
    F16,
    /// 8-bit integers with scales.
    I8,
}

impl Precision {
    /// The name on the command line, in the manifest and of the bundle's sub-folder.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::I8 => "i8",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::F32, Self::F16, Self::I8]
            .into_iter()
            .find(|precision| precision.name() == name)
            .ok_or_else(|| format!("{name} is none of f32, f16, i8"))
    }
}

/// Type of a graph's input or output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// 64-bit signed integers.
    I64,
}

/// A size that is fixed when a graph is loaded; the ONNX file knows it by this name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Symbol {
    /// Texts that `decode` continues at once: the beam.
    Hypotheses,
    /// Words that `decode` can look back on, of all hypotheses together.
    Slots,
}

impl Symbol {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Hypotheses, Self::Slots];

    /// The name in the manifest and the ONNX file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hypotheses => "hypotheses",
            Self::Slots => "slots",
        }
    }
}

/// One size of a shape in a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Size {
    /// The same always.
    Fixed(usize),
    /// Fixed when the graph is loaded.
    Symbol(Symbol),
}

impl From<usize> for Size {
    fn from(size: usize) -> Self {
        Self::Fixed(size)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(size) => write!(f, "{size}"),
            Self::Symbol(symbol) => f.write_str(symbol.name()),
        }
    }
}

/// What a graph's symbols stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// [`Symbol::Hypotheses`].
    pub hypotheses: usize,
    /// [`Symbol::Slots`].
    pub slots: usize,
}

impl Sizes {
    /// Room for so many hypotheses of up to `words` words each, `[CLS]` counted.
    #[must_use]
    pub fn of_beam(hypotheses: usize, words: usize) -> Self {
        Self { hypotheses, slots: hypotheses * words }
    }

    /// What a symbol stands for.
    #[must_use]
    pub fn of(&self, symbol: Symbol) -> usize {
        match symbol {
            Symbol::Hypotheses => self.hypotheses,
            Symbol::Slots => self.slots,
        }
    }
}

/// One input or output of a graph: as it is run, where sizes are numbers, or as the bundle holds it (`D` is [`Size`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSignature<D = usize> {
    /// Name in the ONNX file.
    pub name: String,
    /// Shape.
    pub shape: Vec<D>,
    /// Element type.
    pub dtype: Dtype,
}

/// A graph's name, inputs and outputs, in order: as it is run, or as the bundle holds it (`D` is [`Size`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraphSignature<D = usize> {
    /// `vision`, `decode`, `text` or `match`.
    pub name: String,
    /// What it reads.
    pub inputs: Vec<TensorSignature<D>>,
    /// What it gives.
    pub outputs: Vec<TensorSignature<D>>,
}

impl GraphSignature<Size> {
    /// The signature with numbers in place of symbols.
    #[must_use]
    pub fn fixed(&self, sizes: Sizes) -> GraphSignature {
        let size = |size: &Size| match *size {
            Size::Fixed(size) => size,
            Size::Symbol(symbol) => sizes.of(symbol),
        };
        let fixed = |tensors: &[TensorSignature<Size>]| {
            let fixed = tensors.iter().map(|t| TensorSignature {
                name: t.name.clone(),
                shape: t.shape.iter().map(size).collect(),
                dtype: t.dtype,
            });
            fixed.collect()
        };
        GraphSignature { name: self.name.clone(), inputs: fixed(&self.inputs), outputs: fixed(&self.outputs) }
    }

    /// The four graphs that a bundle of these sizes holds: the one definition that the exporter writes and the runtime runs.
    ///
    /// With `P` image tokens, `T` text slots, `d = hidden / heads`:
    /// - `vision` encodes a picture once, giving the keys and values that every later text token attends to;
    /// - `decode` reads the next word of each of H hypotheses, all at the same `position`. What earlier words left lies in one
    ///   pool of S slots, in any order; row h of `mask` says which of them hypothesis h goes back on. The caller stores the new
    ///   words' keys and values in slots of its choice: branching and dropping hypotheses moves nothing but rows of the mask;
    /// - `text` embeds a whole text;
    /// - `match` scores a picture and a text read jointly (a logit).
    ///
    /// Masks are added to attention scores: 0 for what is seen, −10⁴ for what is not.
    #[must_use]
    pub fn contract(model: &ModelSizes, image: &ImagePreparation) -> Vec<Self> {
        let (hypotheses, slots) = (Size::Symbol(Symbol::Hypotheses), Size::Symbol(Symbol::Slots));
        let fixed = |shape: &[usize]| -> Vec<Size> { shape.iter().copied().map(Size::Fixed).collect() };
        let tensor = |dtype, name: &str, shape: Vec<Size>| TensorSignature { name: name.to_owned(), shape, dtype };
        let f32 = |name: &str, shape: &[usize]| tensor(Dtype::F32, name, fixed(shape));
        let i64 = |name: &str, shape: &[usize]| tensor(Dtype::I64, name, fixed(shape));
        let head_width = model.hidden / model.heads.max(1);
        let cache = |name: &str, rows| {
            let (layers, heads) = (Size::Fixed(model.layers), Size::Fixed(model.heads));
            tensor(Dtype::F32, name, vec![layers, heads, rows, Size::Fixed(head_width)])
        };
        let prefix = Size::Fixed(model.image_tokens);
        let text = model.max_text;
        let regions = [1, model.image_tokens.saturating_sub(1), model.region_feature];
        let pixels = [1, 3, image.height as usize, image.width as usize];
        let embedding = || f32("embedding", &[1, model.embedding]);
        let ids = || i64("ids", &[1, text]);
        let mask = || f32("mask", &[1, text]);
        let graph = |name: &str, inputs, outputs| Self { name: name.to_owned(), inputs, outputs };
        vec![
            graph(
                "vision",
                vec![f32("pixels", &pixels)],
                vec![embedding(), cache("prefix_keys", prefix), cache("prefix_values", prefix), f32("regions", &regions)],
            ),
            graph(
                "decode",
                vec![
                    tensor(Dtype::I64, "tokens", vec![hypotheses]),
                    i64("position", &[1]),
                    cache("prefix_keys", prefix),
                    cache("prefix_values", prefix),
                    cache("past_keys", slots),
                    cache("past_values", slots),
                    tensor(Dtype::F32, "mask", vec![hypotheses, slots]),
                ],
                vec![
                    tensor(Dtype::F32, "logits", vec![hypotheses, Size::Fixed(model.vocabulary)]),
                    cache("new_keys", hypotheses),
                    cache("new_values", hypotheses),
                ],
            ),
            graph("text", vec![ids(), mask()], vec![embedding()]),
            graph("match", vec![f32("regions", &regions), ids(), mask()], vec![f32("score", &[1])]),
        ]
    }
}

/// Sizes of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSizes {
    /// Name of the size, e.g. `edge-s`.
    pub name: String,
    /// Width of the Transformer.
    pub hidden: usize,
    /// Number of its layers.
    pub layers: usize,
    /// Attention heads a layer.
    pub heads: usize,
    /// Ids of the tokenizer.
    pub vocabulary: usize,
    /// Learned text positions.
    pub positions: usize,
    /// Width of the space that pictures and texts share.
    pub embedding: usize,
    /// `[IMG]` and the regions.
    pub image_tokens: usize,
    /// Text slots of the graphs, `[CLS]` and `[SEP]` included.
    pub max_text: usize,
    /// Width of a region's feature.
    pub region_feature: usize,
}

/// How captions are decoded unless the caller says otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecodingDefaults {
    /// Hypotheses kept at every step; 1 is greedy.
    pub beam: usize,
    /// Most ids of a caption, `[CLS]` and `[SEP]` not counted.
    pub max_words: usize,
    /// A hypothesis of n ids is ranked by its log-probability divided by n to this power.
    pub length_penalty: f32,
    /// No run of so many ids occurs twice in a caption; 0 allows repetition.
    #[serde(default)]
    pub no_repeat: usize,
}

/// `manifest.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format, [`SCHEMA`].
    pub schema: u32,
    /// Precisions present, each a sub-folder.
    pub precisions: Vec<Precision>,
    /// Sizes of the model.
    pub model: ModelSizes,
    /// How a picture becomes `pixels`.
    pub image: ImagePreparation,
    /// How captions are decoded by default.
    pub decoding: DecodingDefaults,
    /// Graphs with their inputs and outputs.
    pub graphs: Vec<GraphSignature<Size>>,
    /// SHA-256, in hex, of every file but the manifest.
    pub files: BTreeMap<String, String>,
    /// Data, licences and figures of the training, free-form.
    #[serde(default)]
    pub training: toml::Table,
    /// Measured quality per precision, free-form.
    #[serde(default)]
    pub quality: BTreeMap<String, BTreeMap<String, f64>>,
}

impl Manifest {
    /// Parses and checks a manifest.
    ///
    /// # Errors
    /// Where it is no TOML of this form, has a newer schema, sizes out of range, lacks a graph or has one of another
    /// signature than [`GraphSignature::contract`] fixes, or lists no file that a precision needs.
    pub fn parse(bytes: &[u8]) -> Result<Self, BundleFault> {
        let malformed = |reason: String| BundleFault::Malformed { reason: reason.trim().replace('\n', " ") };
        let text = std::str::from_utf8(bytes).map_err(|error| malformed(error.to_string()))?;
        let table: toml::Table = toml::from_str(text).map_err(|error| malformed(error.message().to_owned()))?;
        // A newer manifest may have any fields: look at its version before holding it to this one's.
        if let Some(found) = table.get("schema").and_then(toml::Value::as_integer)
            && found > i64::from(SCHEMA)
        {
            return Err(BundleFault::NewerSchema { found, supported: SCHEMA });
        }
        if table.get("schema").and_then(toml::Value::as_integer) == Some(1) {
            return Err(BundleFault::OlderSchema { found: 1, supported: SCHEMA });
        }
        let manifest: Self = toml::from_str(text).map_err(|error| malformed(error.message().to_owned()))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The manifest as TOML.
    ///
    /// # Errors
    /// Where a free-form part cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// Path of a graph's ONNX file inside the bundle.
    #[must_use]
    pub fn graph_file(precision: Precision, graph: &str) -> String {
        format!("{precision}/{graph}.onnx")
    }

    fn check(&self) -> Result<(), BundleFault> {
        if self.schema != SCHEMA {
            return Err(BundleFault::Malformed { reason: format!("schema {} does not exist", self.schema) });
        }
        self.check_sizes()?;
        let contract = GraphSignature::contract(&self.model, &self.image);
        for expected in &contract {
            let Some(found) = self.graphs.iter().find(|graph| graph.name == expected.name) else {
                return Err(BundleFault::MissingGraph { graph: expected.name.clone() });
            };
            if found != expected {
                return Err(BundleFault::Signature { graph: expected.name.clone(), reason: difference(expected, found) });
            }
        }
        if self.precisions.is_empty() {
            return Err(BundleFault::Malformed { reason: "no precisions".to_owned() });
        }
        let graphs = self
            .precisions
            .iter()
            .flat_map(|&precision| contract.iter().map(move |graph| Self::graph_file(precision, &graph.name)));
        let needed: BTreeSet<String> = graphs.chain(["tokenizer.json".to_owned()]).collect();
        match needed.into_iter().find(|file| !self.files.contains_key(file)) {
            Some(file) => Err(BundleFault::Unlisted { file }),
            None => Ok(()),
        }
    }

    fn check_sizes(&self) -> Result<(), BundleFault> {
        let model = &self.model;
        let sizes: [(&'static str, usize, RangeInclusive<usize>); 14] = [
            ("model.hidden", model.hidden, 1..=8192),
            ("model.heads", model.heads, 1..=model.hidden),
            ("model.layers", model.layers, 1..=128),
            ("model.vocabulary", model.vocabulary, 6..=1_000_000),
            ("model.positions", model.positions, model.max_text..=65_536),
            ("model.embedding", model.embedding, 1..=8192),
            ("model.image_tokens", model.image_tokens, 2..=4096),
            ("model.max_text", model.max_text, 3..=4096),
            ("model.region_feature", model.region_feature, 1..=65_536),
            ("image.width", self.image.width as usize, 1..=8192),
            ("image.height", self.image.height as usize, 1..=8192),
            ("decoding.beam", self.decoding.beam, 1..=64),
            ("decoding.max_words", self.decoding.max_words, 1..=model.max_text.saturating_sub(1)),
            ("model.hidden modulo model.heads", model.hidden % model.heads.max(1), 0..=0),
        ];
        for (name, value, range) in sizes {
            if !range.contains(&value) {
                return Err(BundleFault::OutOfRange {
                    name,
                    value: value.to_string(),
                    range: format!("{}..={}", range.start(), range.end()),
                });
            }
        }
        let image = &self.image;
        let channels = image.mean.map(|mean| ("image.mean", mean, -1e6..=1e6)).into_iter();
        let channels = channels.chain(image.std.map(|std| ("image.std", std, 1e-6..=1e6)));
        let penalty = ("decoding.length_penalty", self.decoding.length_penalty, 0.0..=8.0);
        for (name, value, range) in channels.chain([penalty]) {
            if !range.contains(&value) {
                return Err(BundleFault::OutOfRange {
                    name,
                    value: value.to_string(),
                    range: format!("{:e}..={:e}", range.start(), range.end()),
                });
            }
        }
        Ok(())
    }
}

/// What is different between two signatures of a graph, in words.
fn difference(expected: &GraphSignature<Size>, found: &GraphSignature<Size>) -> String {
    let shape = |t: &TensorSignature<Size>| {
        let sizes: Vec<String> = t.shape.iter().map(ToString::to_string).collect();
        format!("{} {:?} [{}]", t.name, t.dtype, sizes.join(", "))
    };
    let both = |kind: &str, expected: &[TensorSignature<Size>], found: &[TensorSignature<Size>]| {
        if expected.len() != found.len() {
            return Some(format!("{} {kind}s instead of {}", found.len(), expected.len()));
        }
        let (e, f) = expected.iter().zip(found).find(|(e, f)| e != f)?;
        Some(format!("{kind} {} instead of {}", shape(f), shape(e)))
    };
    both("input", &expected.inputs, &found.inputs)
        .or_else(|| both("output", &expected.outputs, &found.outputs))
        .unwrap_or_default()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A manifest of a tiny model; its files do not exist.
    pub(crate) fn tiny() -> Manifest {
        let model = ModelSizes {
            name: "tiny".to_owned(),
            hidden: 8,
            layers: 2,
            heads: 2,
            vocabulary: 320,
            positions: 16,
            embedding: 4,
            image_tokens: 5,
            max_text: 8,
            region_feature: 6,
        };
        let image = ImagePreparation { width: 32, height: 32, ..ImagePreparation::default() };
        let graphs = GraphSignature::contract(&model, &image);
        let files = graphs.iter().map(|graph| Manifest::graph_file(Precision::F16, &graph.name));
        let files = files.chain(["tokenizer.json".to_owned()]).map(|file| (file, "00".repeat(32))).collect();
        Manifest {
            schema: SCHEMA,
            precisions: vec![Precision::F16],
            model,
            image,
            decoding: DecodingDefaults { beam: 3, max_words: 6, length_penalty: 1.0, no_repeat: 3 },
            graphs,
            files,
            training: toml::toml! { data = "drawn scenes" },
            quality: BTreeMap::from([("f16".to_owned(), BTreeMap::from([("cider".to_owned(), 0.5)]))]),
        }
    }

    #[test]
    fn round_trips() {
        let manifest = tiny();
        let text = manifest.to_toml().unwrap();
        assert_eq!(Manifest::parse(text.as_bytes()).unwrap(), manifest);
    }

    #[test]
    fn each_fault_has_its_sentence() {
        type Break = fn(&mut Manifest);
        let cases: [(Break, &str); 11] = [
            (|m| m.model.heads = 3, "model.hidden modulo model.heads is 2, outside 0..=0"),
            (|m| m.model.heads = 0, "model.heads is 0, outside 1..=8"),
            (|m| m.model.vocabulary = 2_000_000, "model.vocabulary is 2000000, outside 6..=1000000"),
            (|m| m.model.positions = 4, "model.positions is 4, outside 8..=65536"),
            (|m| m.decoding.max_words = 8, "decoding.max_words is 8, outside 1..=7"),
            (|m| m.image.std[1] = 0.0, "image.std is 0, outside 1e-6..=1e6"),
            (|m| m.decoding.length_penalty = -1.0, "decoding.length_penalty is -1, outside"),
            (|m| drop(m.graphs.remove(1)), "the manifest lists no graph \"decode\""),
            (
                |m| m.graphs[2].inputs[0].shape[1] = Size::Fixed(9),
                "graph \"text\" has input ids I64 [1, 9] instead of ids I64 [1, 8]",
            ),
            (|m| drop(m.files.remove("f16/match.onnx")), "the manifest gives no hash for f16/match.onnx"),
            (|m| m.precisions.clear(), "no precisions"),
        ];
        for (break_it, message) in cases {
            let mut manifest = tiny();
            break_it(&mut manifest);
            let error = Manifest::parse(manifest.to_toml().unwrap().as_bytes()).unwrap_err().to_string();
            assert!(error.contains(message), "{error:?} lacks {message:?}");
        }
    }

    #[test]
    fn a_newer_schema_is_named_before_its_fields() {
        let error = Manifest::parse(b"schema = 3\nnovelty = true").unwrap_err();
        assert!(matches!(error, BundleFault::NewerSchema { found: 3, supported: 2 }), "{error}");
        let error = Manifest::parse(b"schema = 1\nnovelty = true").unwrap_err();
        assert!(matches!(error, BundleFault::OlderSchema { found: 1, supported: 2 }), "{error}");
        let error = Manifest::parse(b"schema = 2\nnovelty = true").unwrap_err().to_string();
        assert!(error.contains("novelty"), "{error}");
        Manifest::parse(b"\xff").unwrap_err();
        Manifest::parse(b"not toml at all").unwrap_err();
    }
}
