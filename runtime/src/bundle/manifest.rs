//! `manifest.toml`: what a bundle says about itself.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::BundleFault;
pub use super::precision::{Form, Precision};
use super::signature::difference;
pub use super::signature::{Dtype, GraphSignature, TensorSignature};
pub use super::sizes::{ModelSizes, Size, Sizes, Symbol};
use crate::engine::EngineKind;
use crate::image::ImagePreparation;

/// The manifest's version that this crate writes and reads. In version 1 the `decode` graph read one hypothesis at a time.
pub const SCHEMA: u32 = 2;

/// File beside a precision's graphs that holds the weights of all of them.
pub const WEIGHTS: &str = "weights.bin";

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
    /// Measured quality by [`Self::quality_name`], free-form.
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
        Self::form_file(precision, Form::Expanded, graph)
    }

    /// Path of a graph's ONNX file in one of its forms.
    #[must_use]
    pub fn form_file(precision: Precision, form: Form, graph: &str) -> String {
        match form {
            Form::Expanded => format!("{precision}/{graph}.onnx"),
            other => format!("{precision}/{graph}.{other}.onnx"),
        }
    }

    /// The forms that a precision's graphs are there in.
    #[must_use]
    pub fn forms(&self, precision: Precision) -> Vec<Form> {
        let has = |form: &Form| {
            self.graphs.iter().all(|graph| self.files.contains_key(&Self::form_file(precision, *form, &graph.name)))
        };
        Form::ALL.into_iter().filter(has).collect()
    }

    /// Under which name [`Self::quality`] holds the figures of a form. In the dynamic one engines round differently; floats are
    /// the same on both.
    #[must_use]
    pub fn quality_name(precision: Precision, form: Form, engine: EngineKind) -> String {
        match (form, engine) {
            (Form::Expanded, _) => precision.to_string(),
            (Form::Dynamic, EngineKind::Tract) => format!("{precision}-{form}-{engine}"),
            (form, _) => format!("{precision}-{form}"),
        }
    }

    /// What was measured of a form on an engine.
    #[must_use]
    pub fn figures(&self, precision: Precision, form: Form, engine: EngineKind) -> Option<&BTreeMap<String, f64>> {
        self.quality.get(&Self::quality_name(precision, form, engine))
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
        // A form of which one graph is there is there as a whole.
        let listed = |precision, form| {
            let files = contract.iter().map(move |graph| Self::form_file(precision, form, &graph.name));
            files.clone().any(|file| self.files.contains_key(&file)).then_some(files).into_iter().flatten()
        };
        let forms =
            self.precisions.iter().flat_map(|&precision| Form::ALL.into_iter().flat_map(move |form| listed(precision, form)));
        let needed: BTreeSet<String> = graphs.chain(forms).chain(["tokenizer.json".to_owned()]).collect();
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
        let cases: [(Break, &str); 12] = [
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
            (
                |m| drop(m.files.insert("f16/text.dynamic.onnx".to_owned(), "00".repeat(32))),
                "the manifest gives no hash for f16/decode.dynamic.onnx",
            ),
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
    fn forms_are_known_by_their_files() {
        let mut manifest = tiny();
        assert_eq!(manifest.forms(Precision::F16), [Form::Expanded]);
        assert_eq!(manifest.forms(Precision::I8), []);
        for graph in GraphSignature::contract(&manifest.model, &manifest.image) {
            manifest.files.insert(Manifest::form_file(Precision::F16, Form::Dynamic, &graph.name), "00".repeat(32));
        }
        let manifest = Manifest::parse(manifest.to_toml().unwrap().as_bytes()).unwrap();
        assert_eq!(manifest.forms(Precision::F16), [Form::Expanded, Form::Dynamic]);
        assert_eq!(manifest.figures(Precision::F16, Form::Expanded, EngineKind::Ort).unwrap()["cider"], 0.5);
        assert_eq!(manifest.figures(Precision::F16, Form::Dynamic, EngineKind::Tract), None);
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
