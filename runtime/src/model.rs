//! A bundle opened on an engine: captions, embeds and matches.

mod writer;

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

use ::image::RgbImage;

use self::writer::Writer;
use crate::bundle::manifest::{Form, Manifest, Precision, Sizes};
use crate::bundle::{Bundle, BundleError, BundleFault, BundleSource};
use crate::captioning::{Caption, DecodeOptions, beam_search, log_likelihood};
use crate::engine::{self, Engine, EngineError, EngineOptions, Graph, GraphSource, Tensor};
use crate::tokenizer::{CLS, PAD, SEP, Tokenizer};

/// Added to the attention score of a padded place.
const PADDED: f32 = -1e4;

/// Why a model could not be opened or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The bundle is at fault.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The engine is at fault, or a graph that it was given.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// More words were asked for than the graphs have room for.
    #[error("captions of this model have 1 to {most} words, {asked} were asked for")]
    TooManyWords {
        /// What was asked for.
        asked: usize,
        /// The room.
        most: usize,
    },
}

/// What one look at a picture gives; everything else is computed from it.
#[derive(Debug, Clone)]
pub struct Vision {
    /// The picture in the space that it shares with texts, `[embedding]`, of unit length.
    pub embedding: Vec<f32>,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    regions: Tensor,
}

/// The graphs of a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GraphName {
    /// Picture to embedding, keys and values for decoding, and regions.
    Vision,
    /// One word more of each hypothesis of a caption.
    Decode,
    /// Text to embedding.
    Text,
    /// Regions and text to matching score.
    Match,
}

impl GraphName {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Vision, Self::Decode, Self::Text, Self::Match];

    /// Its name in the manifest.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vision => "vision",
            Self::Decode => "decode",
            Self::Text => "text",
            Self::Match => "match",
        }
    }
}

/// Called with a graph's name before it is loaded; what it returns is dropped once that is done, or has failed.
pub type LoadObserver = Box<dyn Fn(GraphName) -> Box<dyn Any> + Send + Sync>;

/// A graph, and the sizes that it was loaded with.
type Loaded = (Sizes, Arc<dyn Graph>);

/// A bundle opened on an engine. Graphs are loaded when first used, so that who only embeds texts pays for nothing else; many
/// threads may use a model at once.
pub struct Model {
    bundle: Bundle,
    engine: Box<dyn Engine>,
    options: EngineOptions,
    precision: Precision,
    form: Form,
    tokenizer: Tokenizer,
    graphs: [Mutex<Vec<Loaded>>; 4],
    observer: Option<LoadObserver>,
}

impl Model {
    /// Opens a bundle.
    ///
    /// # Errors
    /// Where the bundle is refused, holds nothing of the precision and form asked for, or the engine is not there or does not run
    /// that form.
    pub fn open(source: &BundleSource, options: &EngineOptions) -> Result<Self, ModelError> {
        let engine = engine::open(options)?;
        let bundle = Bundle::open(source)?;
        let precision = bundle.precision(options.precision)?;
        let present = bundle.manifest().forms(precision);
        let form = engine::preferred_form(options, &present)?;
        if !present.contains(&form) {
            return Err(bundle.error(BundleFault::Form { form, precision, present }).into());
        }
        let tokenizer = bundle.tokenizer()?;
        let graphs = Default::default();
        Ok(Self { bundle, engine, options: options.clone(), precision, form, tokenizer, graphs, observer: None })
    }

    /// Has an observer told of every graph that is loaded from now on: an engine may take long over one.
    pub fn observe_loading(&mut self, observer: LoadObserver) {
        self.observer = Some(observer);
    }

    /// SHA-256 of the bundle's manifest, in hex: embeddings of different bundles cannot be compared.
    #[must_use]
    pub fn bundle_id(&self) -> &str {
        self.bundle.id()
    }

    /// What the bundle says about itself.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        self.bundle.manifest()
    }

    /// The bundle.
    #[must_use]
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// How it was opened.
    #[must_use]
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// The weights that run.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The form of the graphs that run.
    #[must_use]
    pub fn form(&self) -> Form {
        self.form
    }

    /// The bundle's tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How the bundle wants captions to be decoded.
    #[must_use]
    pub fn decode_options(&self) -> DecodeOptions {
        DecodeOptions::from(&self.manifest().decoding)
    }

    /// Loads graphs now that would otherwise be loaded when first used; `decode` for the bundle's own beam.
    ///
    /// # Errors
    /// Where a graph or its weights are damaged, or the engine refuses it.
    pub fn load(&self, graphs: &[GraphName]) -> Result<(), ModelError> {
        let beam = self.manifest().decoding.beam;
        graphs.iter().try_for_each(|&name| match name {
            GraphName::Decode => self.load_decoder(beam),
            other => self.graph(other).map(drop),
        })
    }

    /// What one run of a graph takes at least; of `decode`, with the bundle's own beam.
    ///
    /// # Errors
    /// Those of [`Self::load`].
    #[cfg(feature = "tract")]
    pub fn cost(&self, name: GraphName) -> Result<engine::GraphCost, ModelError> {
        let sizes = match name {
            GraphName::Decode => self.decoder_sizes(self.manifest().decoding.beam),
            _ => Sizes { hypotheses: 1, slots: 1 },
        };
        // Forms differ in how they compute, not in what.
        self.with_source(name.name(), Form::Expanded, sizes, engine::graph_cost)
    }

    /// Loads the `decode` graph for so many hypotheses at once. Every beam has one of its own.
    ///
    /// # Errors
    /// Those of [`Self::load`].
    pub fn load_decoder(&self, beam: usize) -> Result<(), ModelError> {
        self.sized_graph(GraphName::Decode, self.decoder_sizes(beam)).map(drop)
    }

    fn decoder_sizes(&self, beam: usize) -> Sizes {
        Sizes::of_beam(beam.max(1), self.manifest().model.max_text)
    }

    /// Most ids of a text, `[CLS]` and `[SEP]` not counted, that [`Self::embed_text`] and [`Self::match_score`] read.
    #[must_use]
    pub fn text_room(&self) -> usize {
        self.manifest().model.max_text - 2
    }

    /// Number of ids of a text that find no room, and are cut off.
    #[must_use]
    pub fn cut_off(&self, text: &str) -> usize {
        self.tokenizer.encode(text, usize::MAX).len().saturating_sub(self.text_room())
    }

    /// Looks at a picture, of any size.
    ///
    /// # Errors
    /// Where the `vision` graph cannot be loaded or run.
    pub fn see(&self, image: &RgbImage) -> Result<Vision, ModelError> {
        let preparation = &self.manifest().image;
        let shape = [1, 3, preparation.height as usize, preparation.width as usize];
        let pixels = tensor(GraphName::Vision, "pixels", Tensor::f32(&shape, preparation.tensor(image)))?;
        let outputs = self.run(GraphName::Vision, &[("pixels", &pixels)])?;
        let [embedding, prefix_keys, prefix_values, regions] = outputs;
        Ok(Vision { embedding: embedding.into_floats(), prefix_keys, prefix_values, regions })
    }

    /// The embedding of a picture, `[embedding]`, of unit length.
    ///
    /// # Errors
    /// Those of [`Self::see`].
    pub fn embed_image(&self, image: &RgbImage) -> Result<Vec<f32>, ModelError> {
        Ok(self.see(image)?.embedding)
    }

    /// The embedding of a text, `[embedding]`, of unit length. Texts are cut to [`Self::text_room`].
    ///
    /// # Errors
    /// Where the `text` graph cannot be loaded or run.
    pub fn embed_text(&self, text: &str) -> Result<Vec<f32>, ModelError> {
        let (ids, mask) = self.padded(text)?;
        let [embedding] = self.run(GraphName::Text, &[("ids", &ids), ("mask", &mask)])?;
        Ok(embedding.into_floats())
    }

    /// The probability that a text describes a picture, both read together.
    ///
    /// # Errors
    /// Where the `match` graph cannot be loaded or run.
    pub fn match_score(&self, vision: &Vision, text: &str) -> Result<f32, ModelError> {
        let (ids, mask) = self.padded(text)?;
        let inputs = [("regions", &vision.regions), ("ids", &ids), ("mask", &mask)];
        let [score] = self.run(GraphName::Match, &inputs)?;
        let logit = score.floats().first().copied().unwrap_or_default();
        Ok(1.0 / (1.0 + (-logit).exp()))
    }

    /// Captions a picture.
    ///
    /// # Errors
    /// Where more words are asked for than the graph has room for, or the `decode` graph cannot be loaded or run.
    pub fn caption(&self, vision: &Vision, options: &DecodeOptions) -> Result<Caption, ModelError> {
        let most = self.manifest().model.max_text - 1;
        if !(1..=most).contains(&options.max_words) {
            return Err(ModelError::TooManyWords { asked: options.max_words, most });
        }
        let mut writer = self.writer(vision, options.beam)?;
        let best = beam_search(&mut writer, options)?;
        let text = self.tokenizer.decode(&best.tokens);
        Ok(Caption { text, tokens: best.tokens, score: best.score, steps: writer.steps() })
    }

    /// Natural logarithm of the probability that the model captions a picture with just this text, which is cut to
    /// [`Self::text_room`]. Of pictures, the likeliest for a text are those that it describes; of texts, short ones and those of
    /// frequent words are the likelier of any picture.
    ///
    /// # Errors
    /// Where the `decode` graph cannot be loaded or run.
    pub fn log_likelihood(&self, vision: &Vision, text: &str) -> Result<f32, ModelError> {
        log_likelihood(&mut self.writer(vision, 1)?, &self.tokenizer.encode(text, self.text_room()))
    }

    fn writer<'a>(&'a self, vision: &'a Vision, beam: usize) -> Result<Writer<'a>, ModelError> {
        let sizes = self.decoder_sizes(beam);
        Ok(Writer::new(self, vision, self.sized_graph(GraphName::Decode, sizes)?, sizes)?)
    }

    /// `ids` and `mask` of a text: `[CLS] w1 … wn [SEP] [PAD] …`.
    fn padded(&self, text: &str) -> Result<(Tensor, Tensor), EngineError> {
        let room = self.manifest().model.max_text;
        let mut ids = vec![CLS];
        ids.extend(self.tokenizer.encode(text, self.text_room()));
        ids.push(SEP);
        let mut mask = vec![0.0; ids.len()];
        ids.resize(room, PAD);
        mask.resize(room, PADDED);
        let ids = Tensor::i64(&[1, room], ids.into_iter().map(i64::from).collect());
        let mask = Tensor::f32(&[1, room], mask);
        Ok((tensor(GraphName::Text, "ids", ids)?, tensor(GraphName::Text, "mask", mask)?))
    }

    fn run<const N: usize>(&self, name: GraphName, inputs: &[(&str, &Tensor)]) -> Result<[Tensor; N], ModelError> {
        Ok(outputs(name, self.graph(name)?.run(inputs)?)?)
    }

    fn graph(&self, name: GraphName) -> Result<Arc<dyn Graph>, ModelError> {
        // Only `decode` has sizes that are not the bundle's.
        self.sized_graph(name, Sizes { hypotheses: 1, slots: 1 })
    }

    /// A graph, loaded at the first call with these sizes. Others who need it wait instead of loading it twice.
    fn sized_graph(&self, name: GraphName, sizes: Sizes) -> Result<Arc<dyn Graph>, ModelError> {
        let mut loaded = self.graphs[name as usize].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, graph)) = loaded.iter().find(|(of, _)| *of == sizes) {
            return Ok(graph.clone());
        }
        let observed = self.observer.as_ref().map(|observer| observer(name));
        let graph = self.load_graph(name.name(), sizes);
        drop(observed);
        let graph: Arc<dyn Graph> = Arc::from(graph?);
        loaded.push((sizes, graph.clone()));
        Ok(graph)
    }

    fn load_graph(&self, name: &str, sizes: Sizes) -> Result<Box<dyn Graph>, ModelError> {
        self.with_source(name, self.form, sizes, |source| self.engine.load(source))
    }

    /// Finds a graph and its weights in the bundle, and hashes them.
    fn with_source<T>(
        &self,
        name: &str,
        form: Form,
        sizes: Sizes,
        work: impl FnOnce(&GraphSource<'_>) -> Result<T, EngineError>,
    ) -> Result<T, ModelError> {
        let signature = self.manifest().graphs.iter().find(|graph| graph.name == name);
        let signature = signature
            .ok_or_else(|| EngineError::Load { graph: name.to_owned(), reason: "the manifest does not list it".to_owned() })?;
        let onnx = self.bundle.read(&Manifest::form_file(self.precision, form, name))?;
        // The weights are hashed here, before the engine sees them, so that a damaged file is called by its name.
        let folder = format!("{}/", self.precision);
        for file in self.manifest().files.keys() {
            if file.starts_with(&folder) && !file.ends_with(".onnx") {
                self.bundle.read(file)?;
            }
        }
        let external = |location: &str| self.bundle.share(&format!("{folder}{location}")).ok();
        Ok(work(&GraphSource { signature: &signature.fixed(sizes), sizes, onnx, external: &external })?)
    }
}

fn outputs<const N: usize>(name: GraphName, outputs: Vec<Tensor>) -> Result<[Tensor; N], EngineError> {
    outputs.try_into().map_err(|outputs: Vec<Tensor>| EngineError::Run {
        graph: name.name().to_owned(),
        reason: format!("it gave {} outputs, expected {N}", outputs.len()),
    })
}

fn tensor(name: GraphName, input: &str, tensor: Option<Tensor>) -> Result<Tensor, EngineError> {
    tensor.ok_or_else(|| EngineError::Run {
        graph: name.name().to_owned(),
        reason: format!("{input} has another size than its shape"),
    })
}

#[cfg(test)]
#[cfg(feature = "tract")]
mod tests;
