//! A model that sees detected regions learns from tables of them: from captions to scores, resumed exactly, damaged lines told.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use candle_core::Device;
use serde_json::Value;
use unimo::tokenizer::Tokenizer;
use unimo_export::checkpoint::Checkpoint;
use unimo_train::checkpoint;
use unimo_train::corpus::Corpus;
use unimo_train::detections::{DetectionCache, write_line};
use unimo_train::evaluation::{Extent, evaluate};
use unimo_train::model::{ModelConfig, Unimo};
use unimo_train::recipe::Recipe;
use unimo_train::scenes::{self, Colour, CorpusOptions, Ground, Shape, Size, read_records, signatures, write_corpus};
use unimo_train::tokenizer_training;
use unimo_train::training::{self, TrainingJob};
use unimo_train::vision::Vision;

/// Features of a region: colour, shape, size, ground, and some that say nothing.
const FEATURES: usize = 40;
/// Classes of a region: each colour of each shape, and the ground.
const CLASSES: usize = 49;

const SIZE: &str = "
name = 'tiny-detected'
hidden = 64
layers = 2
heads = 2
feed_forward = 128
vocabulary = 512
positions = 64
embedding = 64
region_feature = 40
region_classes = 49
detected_regions = 12
dropout = 0.0
initial_deviation = 0.08
";

const RECIPE: &str = "
steps = 500
checkpoint_every = 500
evaluate_every = 500
evaluate_images = 100
[batch]
images = 24
captions = 2
contrast_captions = 2
match_images = 4
match_negatives = 2
masked_pairs = 4
images_alone = 4
[weights]
label_smoothing = 0.0
contrast = 1.5
[optimizer]
learning_rate = 3e-3
warmup_steps = 30
";

/// Numbers in [0, 1) that repeat from run to run.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32
    }
}

fn place<T: PartialEq>(all: &[T], value: T) -> usize {
    all.iter().position(|v| *v == value).unwrap()
}

/// What a detector would say of the scenes in shards: every object once or twice, the second time a little beside it, and the
/// ground, in a random order; features hold what is there, with noise.
fn table(shards: &Path) -> String {
    let (mut draws, side) = (Draws(7), scenes::SIDE as f32);
    let mut table = String::new();
    for (key, record) in read_records(&[shards.to_path_buf()]).unwrap().0 {
        let mut regions: Vec<([f32; 4], Vec<usize>, usize)> = Vec::new();
        for object in &record.graph.objects {
            let [x, y] = object.centre.map(|c| c * side);
            let r = object.radius * side;
            let (colour, shape) = (place(Colour::ALL, object.colour), place(Shape::ALL, object.shape));
            let hot = vec![colour, 8 + shape, 14 + place(Size::ALL, object.size)];
            for copy in 0..1 + usize::from(draws.next() < 0.5) {
                let shift = if copy == 0 { 0.0 } else { 0.2 * r };
                let corners = [x - r + shift, y - r, x + r + shift, y + r].map(|v| v.clamp(0.0, side));
                regions.push((corners, hot.clone(), colour * 6 + shape));
            }
        }
        regions.push(([0.0, 0.0, side, side], vec![16 + place(Ground::ALL, record.graph.background.colour)], CLASSES - 1));
        for i in (1..regions.len()).rev() {
            regions.swap(i, (draws.next() * (i + 1) as f32) as usize);
        }
        let (mut boxes, mut features, mut probabilities) = (Vec::new(), Vec::new(), Vec::new());
        for (corners, hot, class) in regions {
            boxes.extend(corners);
            features.extend((0..FEATURES).map(|f| if hot.contains(&f) { 3.0 } else { 0.0 } + draws.next()));
            probabilities.extend((0..CLASSES).map(|c| if c == class { 0.9 } else { 0.1 / (CLASSES - 1) as f32 }));
        }
        let _ = writeln!(table, "{}", write_line(&key, [scenes::SIDE; 2], &boxes, &features, &probabilities));
    }
    table
}

/// Every objective that sees regions, for a few steps.
const SHORT: &str = "
steps = 8
checkpoint_every = 4
evaluate_every = 8
evaluate_images = 30
[batch]
images = 6
captions = 1
sampled_captions = 2
hidden_regions = 0.2
contrast_captions = 1
match_images = 2
match_negatives = 1
masked_pairs = 2
fragment_pairs = 1
images_alone = 2
[optimizer]
learning_rate = 1e-3
";

/// Draws scenes, writes what a detector says of them and a tokenizer, and describes a run on them.
fn job(folder: &Path) -> TrainingJob {
    let at = |name: &str| folder.join(name);
    let options = CorpusOptions { seed: 51, count: 900, max_objects: 2, ..Default::default() };
    write_corpus(&at("train"), &options).unwrap();
    let exclude = signatures(&[at("train")]).unwrap();
    let held_out = CorpusOptions { seed: 52, count: 100, max_objects: 2, distinct: true, exclude, ..Default::default() };
    write_corpus(&at("dev"), &held_out).unwrap();
    std::fs::create_dir(at("tables")).unwrap();
    for name in ["train", "dev"] {
        std::fs::write(at("tables").join(name).with_extension("tsv"), table(&at(name))).unwrap();
    }
    let captions: Vec<String> = read_records(&[at("train")]).unwrap().0.into_iter().flat_map(|(_, r)| r.captions).collect();
    std::fs::write(at("tokenizer.json"), tokenizer_training::train(captions.iter().map(String::as_str), 400).unwrap()).unwrap();
    TrainingJob {
        recipe: Recipe::from_toml(RECIPE).unwrap(),
        size: ModelConfig::from_toml(SIZE).unwrap(),
        init: None,
        tokenizer: at("tokenizer.json"),
        backbone: None,
        pairs: vec![at("train")],
        images: vec![at("tables/train.tsv")],
        regions: vec![at("tables")],
        texts: Vec::new(),
        rewrites: Vec::new(),
        retrieved: Vec::new(),
        development: vec![at("dev")],
        task: None,
        writing: None,
        features: at("features"),
        run: at("run"),
        resume: false,
        data_note: "drawn scenes".into(),
        stop_after: None,
        activation_checkpointing: false,
        drawing_threads: 0,
        device: candle_core::Device::Cpu,
    }
}

/// Entries of a run's log: those of steps, with their times left out, and the last scores.
fn log(run: &Path) -> (Vec<Value>, Value) {
    let log = std::fs::read_to_string(run.join("log.jsonl")).unwrap();
    let entries = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let (judged, mut steps): (Vec<Value>, Vec<Value>) = entries.partition(|entry| entry["development"] == true);
    for step in &mut steps {
        ["seconds", "elapsed", "waited", "drawn"].iter().for_each(|key| step[*key] = Value::Null);
    }
    (steps, judged.last().cloned().unwrap_or_default())
}

fn mean(name: &str, steps: &[Value]) -> f64 {
    let losses: Vec<f64> = steps.iter().filter_map(|step| step["objectives"][name].as_f64()).collect();
    losses.iter().sum::<f64>() / losses.len() as f64
}

#[test]
fn a_model_learns_from_tables_of_detected_regions() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let last = training::run(&job).unwrap();
    let (steps, scores) = log(&job.run);
    assert_eq!(steps.len(), 500);
    let number = |value: &Value| value.as_f64().unwrap();
    // Chance is 1 % from a text to its picture, 5 % from a picture to one of its texts.
    let (found, told) = (number(&scores["text_to_image"][0]), number(&scores["image_to_text"][0]));
    assert!(found > 0.5 && told > 0.5, "recall at 1: {found} {told}");
    assert!(number(&scores["cider"]) > 1.0, "{scores}");
    // What is hidden has to be told from its neighbours and the caption.
    let falls = |name: &str| mean(name, &steps[460..]) / mean(name, &steps[..20]);
    let (classes, features) = (falls("region_classes"), falls("region_features"));
    assert!(classes < 0.87 && features < 0.95, "{classes} of the first loss of classes is left, {features} of that of features");

    // A checkpoint without a backbone is evaluated alike from its own files, and not exported.
    assert!(!last.join("backbone.safetensors").exists());
    let model = Unimo::load(&last, &Device::Cpu).unwrap();
    let cache = DetectionCache { folder: &job.features, shapes: model.config().region_shapes() };
    let tokenizer = Tokenizer::from_file(&last.join("tokenizer.json")).unwrap();
    let mut corpus = Corpus::default();
    corpus.add_detections(&job.regions, &cache, &|_| ()).unwrap();
    assert!(corpus.damaged.is_empty());
    corpus.add_detections(&job.images, &cache, &|_| ()).unwrap();
    let told = corpus.damaged.iter().filter(|damage| damage.reason.contains("an earlier table"));
    assert_eq!((told.count(), corpus.damaged.len()), (900, 900));
    assert_eq!(corpus.add_captions(&job.development, &tokenizer, 48).unwrap(), 0);
    let vision = Vision::of_checkpoint(&last, model.config(), &Device::Cpu).unwrap();
    let again = evaluate(&model, &vision, &tokenizer, &corpus, Extent { images: 100, rerank: None }).unwrap();
    let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
    assert!(near(again.cider, number(&scores["cider"])) && near(again.text_to_image[0], found), "{again}");
    let refused = Checkpoint::open(&job.run).err().unwrap().to_string();
    assert!(refused.contains("only models of a grid") && !refused.contains("backbone"), "{refused}");
}

#[test]
fn a_run_on_detected_regions_resumes_exactly_and_refuses_what_does_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let first = TrainingJob { recipe: Recipe::from_toml(SHORT).unwrap(), ..job(folder.path()) };
    training::run(&first).unwrap();
    let cut = TrainingJob { run: folder.path().join("cut"), ..first.clone() };
    training::run(&TrainingJob { stop_after: Some(6), ..cut.clone() }).unwrap();
    training::run(&TrainingJob { resume: true, ..cut.clone() }).unwrap();
    let (steps, scores) = log(&first.run);
    assert_eq!((steps.len(), scores["images"].as_u64()), (8, Some(30)));
    assert!(steps.iter().all(|step| step["objectives"].as_object().unwrap().len() >= 6), "{steps:?}");
    assert_eq!(log(&cut.run), (steps, scores));

    // Fine-tuning starts from it; what a table lacks or holds wrongly is left out.
    let train = std::fs::read_to_string(folder.path().join("tables/train.tsv")).unwrap();
    let lines: Vec<&str> = train.lines().collect();
    let many = write_line("many", [9, 9], &[1.0; 52], &[1.0; 13 * FEATURES], &[0.01; 13 * CLASSES]);
    let some = [&lines[..500].join("\n"), &many, &lines[500][..700], &lines[501..600].join("\n")].map(String::from).join("\n");
    let table = folder.path().join("some.tsv");
    std::fs::write(&table, some).unwrap();
    let next = TrainingJob {
        init: Some(first.run.clone()),
        regions: vec![table.clone()],
        images: vec![table],
        development: Vec::new(),
        run: folder.path().join("next"),
        ..first.clone()
    };
    let last = training::run(&next).unwrap();
    let note = std::fs::read_to_string(last.join("training.toml")).unwrap();
    assert!(note.contains("pairs = 599") && note.contains("images_alone = 599"), "{note}");
    assert_eq!(checkpoint::state(&last).unwrap().step, 8);

    let refused =
        |job: TrainingJob| format!("{:#}", training::run(&TrainingJob { run: folder.path().join("no"), ..job }).unwrap_err());
    let backbone = Some(PathBuf::from("backbone.safetensors"));
    for (job, says) in [
        (TrainingJob { backbone, ..first.clone() }, "has no backbone"),
        (TrainingJob { regions: Vec::new(), ..first.clone() }, "give the tables"),
        (TrainingJob { size: ModelConfig::named("pico").unwrap(), ..first.clone() }, "--regions are for a size"),
        (TrainingJob { size: ModelConfig::named("base").unwrap(), ..first.clone() }, "no usable line"),
        (
            TrainingJob { pairs: first.development.clone(), regions: vec![folder.path().join("some.tsv")], ..first.clone() },
            "none of the",
        ),
    ] {
        let error = refused(job);
        assert!(error.contains(says), "{error} does not say {says}");
    }
}
