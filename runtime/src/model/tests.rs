//! A model on a toy bundle whose right answers can be told without it.

use std::fs;

use ::image::Rgb;

use super::*;
use crate::bundle::manifest::{self, GraphSignature};
use crate::bundle::{MANIFEST, sha256_hex};
use crate::engine::toy;
use crate::tokenizer;

/// A bundle folder with the toy model of [`toy::graphs`].
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer::tests::json(["[CLS]", "[PAD]", "[SEP]", "[UNK]"], true);
    let mut manifest = manifest::tests::tiny();
    manifest.model.vocabulary = Tokenizer::from_bytes(&tokenizer).unwrap().vocabulary_size();
    manifest.graphs = GraphSignature::contract(&manifest.model, &manifest.image);
    let (graphs, weights) = toy::graphs(&manifest.model, &manifest.graphs);
    let graphs = graphs.into_iter().map(|(name, onnx)| (Manifest::graph_file(Precision::F16, &name), onnx));
    let others = [("tokenizer.json".to_owned(), tokenizer), ("f16/weights.bin".to_owned(), weights)];
    fs::create_dir(folder.path().join("f16")).unwrap();
    for (file, bytes) in graphs.chain(others) {
        fs::write(folder.path().join(&file), &bytes).unwrap();
        manifest.files.insert(file, sha256_hex(&bytes));
    }
    fs::write(folder.path().join(MANIFEST), manifest.to_toml().unwrap()).unwrap();
    folder
}

fn open(folder: &tempfile::TempDir) -> Result<Model, ModelError> {
    Model::open(&BundleSource::Path(folder.path().to_path_buf()), &EngineOptions::default())
}

fn grey(level: u8) -> RgbImage {
    RgbImage::from_pixel(40, 30, Rgb([level; 3]))
}

#[test]
fn captions_follow_picture_place_and_mask() {
    let (folder, options) = (folder(), |beam| DecodeOptions { beam, max_words: 6, length_penalty: 1.0, no_repeat: 0 });
    let model = open(&folder).unwrap();
    for (level, first) in [(0, 48), (255, 80)] {
        let vision = model.see(&grey(level)).unwrap();
        for beam in [1, 4] {
            let caption = model.caption(&vision, &options(beam)).unwrap();
            assert_eq!(caption.tokens, [first, first + 1, first + 2], "level {level}, beam {beam}");
            // Three words and `[SEP]`; a wider beam may look further.
            assert!(if beam == 1 { caption.steps == 4 } else { (4..=6).contains(&caption.steps) }, "{}", caption.steps);
            assert_eq!(caption.text, model.tokenizer().decode(&caption.tokens));
        }
        let short = DecodeOptions { max_words: 2, ..options(1) };
        assert_eq!(model.caption(&vision, &short).unwrap().tokens, [first, first + 1]);
    }
    let vision = model.see(&grey(9)).unwrap();
    let error = model.caption(&vision, &DecodeOptions { max_words: 8, ..options(1) }).unwrap_err().to_string();
    assert_eq!(error, "captions of this model have 1 to 7 words, 8 were asked for");
}

#[test]
fn embeddings_have_unit_length_and_see_their_input() {
    let folder = folder();
    let model = open(&folder).unwrap();
    let red = model.embed_image(&RgbImage::from_pixel(8, 8, Rgb([255, 0, 0]))).unwrap();
    // (1, −1, −1) times the colour weight, before it gets unit length.
    let raw = [0.5f32, -1.0, -1.0, -0.25];
    let length = raw.iter().map(|x| x * x).sum::<f32>().sqrt();
    for (found, expected) in red.iter().zip(raw) {
        // Weights of 16 bits hold 0.25 and 1 exactly; sums of f32.
        assert!((found - expected / length).abs() < 1e-5, "{red:?}");
    }
    let text = model.embed_text("a dog").unwrap();
    let ids = model.tokenizer().encode("a dog", 6);
    let sum = (u64::from(SEP) + ids.iter().map(|&id| u64::from(id)).sum::<u64>()) as f32;
    let count = (ids.len() + 2) as f32;
    assert!((text[1] / text[0] - sum / count).abs() < 1e-3 * sum, "{text:?}: {sum} / {count}");
    assert!((text.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);
}

#[test]
fn matching_gives_a_probability() {
    let folder = folder();
    let model = open(&folder).unwrap();
    let ids = model.tokenizer().encode("a dog", 6).len() + 2;
    for (level, sign) in [(0, -1.0), (255, 1.0)] {
        let score = model.match_score(&model.see(&grey(level)).unwrap(), "a dog").unwrap();
        let expected = 1.0 / (1.0 + (-sign * ids as f32).exp());
        assert!((score - expected).abs() < 1e-5, "level {level}: {score} {expected}");
    }
}

#[test]
fn a_texts_likelihood_is_that_of_its_ids_one_after_the_other() {
    let folder = folder();
    let model = open(&folder).unwrap();
    let vocabulary = model.manifest().model.vocabulary;
    for (level, start) in [(0, 48.0), (255, 80.0)] {
        let vision = model.see(&grey(level)).unwrap();
        let found = f64::from(model.log_likelihood(&vision, "a dog").unwrap());
        let ids = model.tokenizer().encode("a dog", 6);
        // The toy's logits by hand: −(id − start − n)² after n words, and 10⁵ (n − 2.5) more for `[SEP]`.
        let expected: f64 = (0..=ids.len())
            .map(|n| {
                let logit = |id: usize| {
                    let end = if id == SEP as usize { 1e5 * (n as f64 - 2.5) } else { 0.0 };
                    end - (id as f64 - start - n as f64).powi(2)
                };
                let largest = (0..vocabulary).map(logit).fold(f64::MIN, f64::max);
                let normaliser = largest + (0..vocabulary).map(|id| (logit(id) - largest).exp()).sum::<f64>().ln();
                logit(ids.get(n).map_or(SEP as usize, |&id| id as usize)) - normaliser
            })
            .sum();
        // f32 numbers of size 10⁵.
        assert!((found - expected).abs() < 1e-5 * expected.abs(), "level {level}: {found} {expected}");
    }
    // As many ids as a text may have still leave room for `[SEP]`.
    let vision = model.see(&grey(9)).unwrap();
    assert_eq!(model.log_likelihood(&vision, "zzzzzzzzz").unwrap(), model.log_likelihood(&vision, "zzzzzzzzzz").unwrap());
}

#[test]
fn long_texts_are_cut_and_counted() {
    let folder = folder();
    let model = open(&folder).unwrap();
    assert_eq!(model.text_room(), 6);
    assert_eq!(model.cut_off("a dog"), 0);
    let long = "zzzzzzzzz";
    assert_eq!(model.cut_off(long), model.tokenizer().encode(long, 100).len() - 6);
    assert_eq!(model.embed_text(long).unwrap(), model.embed_text("zzzzzzzzzz").unwrap());
}

#[test]
fn what_is_loaded_is_verified() {
    let flip = |file: &str, folder: &std::path::Path| {
        let path = folder.join(file);
        let mut bytes = fs::read(&path).unwrap();
        bytes[3] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    for file in ["f16/vision.onnx", "f16/weights.bin"] {
        let folder = folder();
        flip(file, folder.path());
        let model = open(&folder).unwrap();
        let error = model.embed_image(&grey(1)).unwrap_err();
        let ModelError::Bundle(error) = error else { panic!("{error}") };
        assert!(matches!(&error.fault, BundleFault::Hash { file: found, .. } if found == file), "{error}");
    }
    let folder = folder();
    let path = folder.path().join(MANIFEST);
    let mut manifest = Manifest::parse(&fs::read(&path).unwrap()).unwrap();
    manifest.model.vocabulary = 400;
    manifest.graphs = GraphSignature::contract(&manifest.model, &manifest.image);
    fs::write(&path, manifest.to_toml().unwrap()).unwrap();
    let error = open(&folder).err().unwrap().to_string();
    assert!(error.contains("tokenizer.json has ") && error.ends_with(" ids, the model has 400"), "{error}");
}

#[test]
fn an_observer_sees_each_graph_loaded_once() {
    struct Loading(Arc<Mutex<Vec<String>>>, GraphName);
    impl Drop for Loading {
        fn drop(&mut self) {
            self.0.lock().unwrap().push(format!("{} done", self.1.name()));
        }
    }
    let folder = folder();
    let mut model = open(&folder).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let of_observer = seen.clone();
    model.observe_loading(Box::new(move |graph| {
        of_observer.lock().unwrap().push(graph.name().to_owned());
        Box::new(Loading(of_observer.clone(), graph))
    }));
    let vision = model.see(&grey(9)).unwrap();
    model.see(&grey(200)).unwrap();
    assert_eq!(*seen.lock().unwrap(), ["vision", "vision done"]);
    // One that cannot be loaded is over as well.
    fs::write(folder.path().join("f16/match.onnx"), b"no graph").unwrap();
    assert!(model.match_score(&vision, "a dog").is_err());
    assert_eq!(seen.lock().unwrap()[2..], ["match", "match done"]);
}

/// The shipped model, with ONNX Runtime: whether its words' keys and values lie with the engine or here makes no difference. The
/// processor's memory stands for a device's.
#[cfg(all(feature = "ort", feature = "embedded-bundle"))]
#[test]
fn captions_are_the_same_with_the_past_kept_by_the_engine() {
    let options = EngineOptions { engine: engine::EngineKind::Ort, ..EngineOptions::default() };
    let Some(here) = engine::tests::with_library(Model::open(&BundleSource::Embedded, &options)) else { return };
    let mut there = Model::open(&BundleSource::Embedded, &options).unwrap();
    there.engine = engine::tests::ort_with_device(&options).unwrap();
    let pictures = [
        grey(90),
        RgbImage::from_fn(64, 48, |x, y| Rgb([4 * x as u8, 5 * y as u8, 120])),
        RgbImage::from_fn(50, 50, |x, y| if (x / 10 + y / 10) % 2 == 0 { Rgb([200, 40, 30]) } else { Rgb([20, 160, 60]) }),
    ];
    for picture in &pictures {
        let vision = here.see(picture).unwrap();
        for beam in [1, 3] {
            let options =
                DecodeOptions { beam, max_words: here.manifest().model.max_text - 1, length_penalty: 0.6, no_repeat: 0 };
            let (a, b) = (here.caption(&vision, &options).unwrap(), there.caption(&vision, &options).unwrap());
            assert_eq!((a.tokens, a.steps), (b.tokens, b.steps));
            assert!((a.score - b.score).abs() < 1e-5, "{} {}", a.score, b.score);
        }
        // As long a text as there is room for.
        let text = "a dog runs over the green grass ".repeat(8);
        let [a, b] = [&here, &there].map(|model| model.log_likelihood(&vision, &text).unwrap());
        assert!((a - b).abs() < 1e-4 * a.abs(), "{a} {b}");
    }
    let sizes = there.decoder_sizes(3);
    assert!(there.sized_graph(GraphName::Decode, sizes).unwrap().cached().unwrap().is_some());
    assert!(here.sized_graph(GraphName::Decode, sizes).unwrap().cached().unwrap().is_none());
}
