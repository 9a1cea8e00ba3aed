//! A model that sees detected regions learns from tables of them: from captions to scores, resumed exactly, damaged lines told.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use unimo_tests::{Run, program};
use unimo_train::detections::write_line;
use unimo_train::scenes::{Colour, Ground, Shape, Size, read_records};

/// Pixels along a side of a drawn scene.
const SIDE: f32 = 256.0;
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
checkpoint_every = 250
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

fn done(name: &str, arguments: &[&str]) -> Run {
    let run = program(name, arguments);
    assert_eq!(run.code, 0, "{name} {arguments:?}\n{}\n{}", run.stdout, run.stderr);
    run
}

/// Numbers in [0, 1) that repeat from run to run.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32
    }
}

/// What a detector would say of the scenes in shards: every object once or twice, the second time a little beside it, and the
/// ground, in a random order; features hold what is there, with noise.
fn table(shards: &Path) -> String {
    let mut draws = Draws(7);
    let mut table = String::new();
    for (key, record) in read_records(&[shards.to_path_buf()]).unwrap().0 {
        let place = |value: &str, all: &[&str]| all.iter().position(|v| *v == value).unwrap();
        let words = |all: Vec<&'static str>| all;
        let colours = words(Colour::ALL.iter().map(|v| v.word()).collect());
        let shapes = words(Shape::ALL.iter().map(|v| v.word()).collect());
        let sizes = words(Size::ALL.iter().map(|v| v.word()).collect());
        let grounds = words(Ground::ALL.iter().map(|v| v.word()).collect());
        let mut regions: Vec<([f32; 4], Vec<usize>, usize)> = Vec::new();
        for object in &record.graph.objects {
            let [x, y] = object.centre.map(|c| c * SIDE);
            let r = object.radius * SIDE;
            let (colour, shape) = (place(object.colour.word(), &colours), place(object.shape.word(), &shapes));
            let hot = vec![colour, 8 + shape, 14 + place(object.size.word(), &sizes)];
            for copy in 0..1 + usize::from(draws.next() < 0.5) {
                let shift = if copy == 0 { 0.0 } else { 0.2 * r };
                let corners = [x - r + shift, y - r, x + r + shift, y + r].map(|v| v.clamp(0.0, SIDE));
                regions.push((corners, hot.clone(), colour * 6 + shape));
            }
        }
        regions.push(([0.0, 0.0, SIDE, SIDE], vec![16 + place(record.graph.background.colour.word(), &grounds)], CLASSES - 1));
        for i in (1..regions.len()).rev() {
            regions.swap(i, (draws.next() * (i + 1) as f32) as usize);
        }
        let (mut boxes, mut features, mut probabilities) = (Vec::new(), Vec::new(), Vec::new());
        for (corners, hot, class) in regions {
            boxes.extend(corners);
            features.extend((0..FEATURES).map(|f| if hot.contains(&f) { 3.0 } else { 0.0 } + draws.next()));
            probabilities.extend((0..CLASSES).map(|c| if c == class { 0.9 } else { 0.1 / (CLASSES - 1) as f32 }));
        }
        let _ = writeln!(table, "{}", write_line(&key, [SIDE as u32; 2], &boxes, &features, &probabilities));
    }
    table
}

/// Drawn scenes, what a detector says of them, a tokenizer, a size, a recipe.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        let at = |name: &str| place.at(name);
        done("unimo-train", &["data", "scenes", "--out", &at("train"), "--count", "900", "--seed", "51", "--max-objects", "2"]);
        let mut arguments = vec!["data", "scenes", "--count", "100", "--seed", "52", "--max-objects", "2", "--distinct"];
        let (train, dev, tokenizer) = (at("train"), at("dev"), at("tokenizer.json"));
        arguments.extend(["--exclude", &train, "--out", &dev]);
        done("unimo-train", &arguments);
        done("unimo-train", &["tokenizer", "--pairs", &train, "--vocabulary", "400", "--out", &tokenizer]);
        std::fs::create_dir(place.path("tables")).unwrap();
        std::fs::write(place.path("tables/train.tsv"), table(&place.path("train"))).unwrap();
        // A line cut short, and one of a picture with too many regions.
        let dev = table(&place.path("dev"));
        let many = write_line("many", [9, 9], &[1.0; 52], &[1.0; 13 * FEATURES], &[0.01; 13 * CLASSES]);
        std::fs::write(place.path("tables/dev.tsv"), format!("{dev}{many}\n{}", &dev[..700])).unwrap();
        std::fs::write(place.path("size.toml"), SIZE).unwrap();
        std::fs::write(place.path("recipe.toml"), RECIPE).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn at(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Runs a training command with this place's data, its run in the folder `out`.
    fn train(&self, command: &[&str], out: &str, more: &[&str]) -> Run {
        let at = |name: &str| self.at(name);
        let (tokenizer, train, dev, tables, table) =
            (at("tokenizer.json"), at("train"), at("dev"), at("tables"), at("tables/train.tsv"));
        let (features, out) = (at("features"), at(out));
        let mut arguments = command.to_vec();
        arguments.extend(["--tokenizer", &tokenizer, "--pairs", &train, "--dev", &dev, "--regions", &tables]);
        arguments.extend(["--images", &table, "--features", &features, "--out", &out]);
        arguments.extend(more);
        program("unimo-train", &arguments)
    }

    /// Entries of a run's log: those of steps, with their times left out, and the last scores.
    fn log(&self, run: &str) -> (Vec<Value>, Value) {
        let log = std::fs::read_to_string(self.path(run).join("log.jsonl")).unwrap();
        let entries = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let (judged, mut steps): (Vec<Value>, Vec<Value>) = entries.partition(|entry| entry["development"] == true);
        for step in &mut steps {
            ["seconds", "waited"].iter().for_each(|key| step[*key] = Value::Null);
        }
        (steps, judged.last().cloned().unwrap_or_default())
    }
}

#[test]
fn a_model_learns_from_tables_of_detected_regions() {
    let place = Place::new();
    let (size, recipe) = (place.at("size.toml"), place.at("recipe.toml"));
    let pretrain = ["pretrain", "--size", &size, "--recipe", &recipe];

    let refused = place.train(&pretrain, "refused", &["--backbone", "b"]);
    assert!(refused.code == 3 && refused.stderr.contains("has no backbone"), "{}", refused.stderr);
    let grid = place.train(&["pretrain", "--size", "pico", "--recipe", &recipe], "refused", &[]);
    assert!(grid.code == 3 && grid.stderr.contains("backbone"), "{}", grid.stderr);

    // Cut after 250 steps and gone on with: the same losses and scores as in one piece.
    let cut = place.train(&pretrain, "cut", &["--stop-after", "260"]);
    assert_eq!(cut.code, 0, "{}", cut.stderr);
    assert!(
        cut.stderr.contains("900 pictures with captions, 900 alone") && cut.stderr.contains("100 for development"),
        "{}",
        cut.stderr
    );
    for said in ["line 101 in", "13 regions, and at most 12", "line 102 in", "; 2 records skipped"] {
        assert!(cut.stderr.contains(said), "{said} is not in {}", cut.stderr);
    }
    let rest = place.train(&pretrain, "cut", &["--resume"]);
    assert!(rest.code == 0 && rest.stderr.contains("going on after step 250"), "{}", rest.stderr);
    let whole = place.train(&pretrain, "whole", &[]);
    assert_eq!(whole.code, 0, "{}", whole.stderr);
    let (steps, scores) = place.log("whole");
    assert_eq!(steps.len(), 500);
    assert_eq!(place.log("cut"), (steps.clone(), scores.clone()));

    // Chance is 1 % from a text to its picture, 5 % from a picture to one of its texts.
    let number = |value: &Value| value.as_f64().unwrap();
    let (found, told) = (number(&scores["text_to_image"][0]), number(&scores["image_to_text"][0]));
    assert!(found > 0.5 && told > 0.5, "recall at 1: {found} {told}");
    assert!(number(&scores["cider"]) > 1.0, "{scores}");
    let of = |name: &str, steps: &[Value]| {
        let losses: Vec<f64> = steps.iter().filter_map(|step| step["objectives"][name].as_f64()).collect();
        losses.iter().sum::<f64>() / losses.len() as f64
    };
    // What is hidden has to be told from its neighbours and the caption: classes better than by their frequencies.
    let (first, last) = (of("region_classes", &steps[..20]), of("region_classes", &steps[480..]));
    assert!(last < 0.75 * first, "region classes: {first} then {last}");

    let (checkpoint, dev, tables, features) = (place.at("whole"), place.at("dev"), place.at("tables"), place.at("features"));
    let mut arguments = vec!["eval", "checkpoint", "--checkpoint", &checkpoint, "--dev", &dev, "--regions", &tables];
    arguments.extend(["--features", &features, "--json"]);
    let evaluated = &done("unimo-train", &arguments).json_lines()[0];
    assert_eq!((&evaluated["cider"], &evaluated["image_to_text"]), (&scores["cider"], &scores["image_to_text"]));

    // Fine-tuning goes on from there, by its metric as well: captions drawn of pictures with unlike numbers of regions.
    let tune = "steps = 20\nevaluate_every = 20\nevaluate_images = 100\n[batch]\nimages = 16\ncaptions = 1\nsampled_captions = 3\n\
                hidden_regions = 0.1\n[optimizer]\nlearning_rate = 1e-4\nwarmup_steps = 2\n";
    std::fs::write(place.path("tune.toml"), tune).unwrap();
    let tune = place.at("tune.toml");
    let tuned = place.train(&["finetune", "self-critical", "--init", &checkpoint, "--recipe", &tune], "tuned", &[]);
    assert_eq!(tuned.code, 0, "{}", tuned.stderr);
    let (steps, after) = place.log("tuned");
    assert!(steps.iter().all(|step| step["reward"].as_f64().unwrap() > 0.3), "{steps:?}");
    assert!(number(&after["cider"]) > 0.9 * number(&scores["cider"]), "{after}");

    let bundle = place.at("bundle.tar");
    let exported = program("unimo-export", &["--checkpoint", &checkpoint, "--out", &bundle]);
    assert!(exported.code == 3 && exported.stderr.contains("only models of a grid"), "{}", exported.stderr);
    assert!(!place.path("bundle.tar").exists());
}
