//! All graphs of a bundle on a picture and its text, as the runtime runs them one after the other: what one gives, the next reads.

use anyhow::{Context, Result};
use unimo::bundle::Bundle;
use unimo::bundle::manifest::{Dtype, Form, GraphSignature, Manifest, Precision, Sizes};
use unimo::captioning::KvPool;
use unimo::engine::{Engine, Graph, GraphSource, Tensor};
use unimo::tokenizer::{CLS, PAD, SEP, Tokenizer};

use crate::parity::Sample;

/// Texts decoded at once: the sample's, and its words backwards.
const HYPOTHESES: usize = 2;
/// Added to the attention score of a padded place, as the runtime does.
const PADDED: f32 = -1e4;

/// Graphs by their names, on an engine.
pub(crate) struct Loaded(Vec<(GraphSignature, Box<dyn Graph>)>);

/// Sizes that a walk's graphs are loaded with.
pub(crate) fn sizes(manifest: &Manifest) -> Sizes {
    Sizes::of_beam(HYPOTHESES, manifest.model.max_text)
}

impl Loaded {
    /// Loads the graphs of a bundle.
    pub fn of(bundle: &Bundle, precision: Precision, form: Form, engine: &dyn Engine) -> Result<Self> {
        let sizes = sizes(bundle.manifest());
        let load = |signature: &GraphSignature<_>| {
            let onnx = bundle.read(&Manifest::form_file(precision, form, &signature.name))?;
            Self::load(bundle, precision, signature.fixed(sizes), onnx, engine)
        };
        Ok(Self(bundle.manifest().graphs.iter().map(load).collect::<Result<_>>()?))
    }

    /// Graphs that no bundle holds, over the weights of one that does.
    pub fn over(
        bundle: &Bundle,
        precision: Precision,
        graphs: &[(GraphSignature, Vec<u8>)],
        engine: &dyn Engine,
    ) -> Result<Self> {
        let load = |(signature, onnx): &(GraphSignature, Vec<u8>)| Self::load(bundle, precision, signature.clone(), onnx, engine);
        Ok(Self(graphs.iter().map(load).collect::<Result<_>>()?))
    }

    fn load(
        bundle: &Bundle,
        precision: Precision,
        signature: GraphSignature,
        onnx: &[u8],
        engine: &dyn Engine,
    ) -> Result<(GraphSignature, Box<dyn Graph>)> {
        let external = |location: &str| bundle.share(&format!("{precision}/{location}")).ok();
        let source = GraphSource { signature: &signature, sizes: sizes(bundle.manifest()), onnx, external: &external };
        let graph = engine.load(&source)?;
        Ok((signature, graph))
    }

    /// Runs a graph.
    pub fn run(&self, graph: &str, inputs: &[(&str, &Tensor)]) -> Result<(&GraphSignature, Vec<Tensor>)> {
        let (signature, graph) =
            self.0.iter().find(|(signature, _)| signature.name == graph).with_context(|| format!("no graph {graph}"))?;
        Ok((signature, graph.run(inputs)?))
    }
}

/// What a run read, by name.
pub(crate) type Inputs<'a> = &'a [(&'a str, &'a Tensor)];

/// Is told of a run: the graph, what it read and what it gave.
pub(crate) type Visit<'v> = dyn FnMut(&GraphSignature, Inputs<'_>, &[Tensor]) -> Result<()> + 'v;

/// Runs the graphs on a sample; `visit` is told of each run.
pub(crate) fn walk(
    graphs: &Loaded,
    manifest: &Manifest,
    tokenizer: &Tokenizer,
    sample: &Sample,
    visit: &mut Visit<'_>,
) -> Result<()> {
    let (image, room) = (&manifest.image, manifest.model.max_text);
    let mut run = |graph: &str, inputs: Inputs<'_>| -> Result<Vec<Tensor>> {
        let (signature, outputs) = graphs.run(graph, inputs)?;
        visit(signature, inputs, &outputs)?;
        Ok(outputs)
    };
    let pixels = tensor(&[1, 3, image.height as usize, image.width as usize], image.tensor(&sample.image))?;
    let seen = run("vision", &[("pixels", &pixels)])?;

    let words = tokenizer.encode(&sample.text, room - 2);
    let forwards: Vec<u32> = [CLS].into_iter().chain(words.iter().copied()).collect();
    let backwards: Vec<u32> = [CLS].into_iter().chain(words.iter().rev().copied()).collect();
    let mut pool = KvPool::new(&manifest.model, sizes(manifest));
    for position in 0..forwards.len() {
        let (read, parents) = match position {
            0 => (1, [0, 0]),
            1 => (HYPOTHESES, [0, 0]),
            _ => (HYPOTHESES, [0, 1]),
        };
        pool.branch(parents.into_iter().take(read));
        let tokens = [&forwards, &backwards].map(|text| i64::from(text[position])).to_vec();
        let inputs = [
            ("tokens", &integers(&[HYPOTHESES], tokens)?),
            ("position", &integers(&[1], vec![position as i64])?),
            ("prefix_keys", &seen[1]),
            ("prefix_values", &seen[2]),
        ];
        let given = run("decode", &[&inputs[..], &pool.inputs()[..]].concat())?;
        pool.store(&given[1], &given[2], read);
    }

    let ids: Vec<u32> = forwards.into_iter().chain([SEP]).collect();
    let padding = room - ids.len();
    let mask = tensor(&[1, room], [vec![0.0; ids.len()], vec![PADDED; padding]].concat())?;
    let ids = integers(&[1, room], ids.into_iter().chain(vec![PAD; padding]).map(i64::from).collect())?;
    run("text", &[("ids", &ids), ("mask", &mask)])?;
    run("match", &[("regions", &seen[3]), ("ids", &ids), ("mask", &mask)])?;
    Ok(())
}

fn tensor(shape: &[usize], values: Vec<f32>) -> Result<Tensor> {
    Tensor::f32(shape, values).with_context(|| format!("values do not fill {shape:?}"))
}

fn integers(shape: &[usize], values: Vec<i64>) -> Result<Tensor> {
    Tensor::i64(shape, values).with_context(|| format!("values do not fill {shape:?} of {:?}", Dtype::I64))
}
