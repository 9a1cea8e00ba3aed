//! A run reaches every parameter, and one that was killed goes on as if nothing had happened.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use unimo_train::ablation::{Plan, ablate};
use unimo_train::model::{ImageEmbedding, ModelConfig, TextEmbedding};
use unimo_train::recipe::Recipe;
use unimo_train::retrieval::{RetrievalJob, Seer, retrieve};
use unimo_train::rewriting::{Counts, RewriteJob, rewrite};
use unimo_train::scenes::{CorpusOptions, write_corpus};
use unimo_train::training::{self, TrainingJob};
use unimo_train::{backbone, checkpoint, tokenizer_training};

mod pooled;

use self::pooled::{HEADS, POOLED};

const RECIPE: &str = "
steps = 6
views = 2
checkpoint_every = 2
evaluate_every = 100
[batch]
images = 4
captions = 2
sampled_captions = 2
contrast_captions = 2
match_images = 2
match_negatives = 2
match_rewrites = 1
retrieved_pairs = 2
retrieved_images = 2
retrieved_texts = 1
masked_pairs = 2
fragment_pairs = 2
texts = 4
fragment_texts = 2
images_alone = 2
[weights]
cross_modal = 0.5
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
";

/// What trains with the backbone's last two blocks.
const WITH_BACKBONE: &str = "
steps = 4
views = 2
trained_blocks = 2
checkpoint_every = 2
evaluate_every = 100
[batch]
images = 4
captions = 2
hidden_regions = 0.1
sampled_captions = 2
contrast_captions = 2
match_images = 2
match_negatives = 1
fragment_pairs = 1
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
";

fn rewritten(shards: &Path, out: &Path) {
    let counts = Counts { word: 2, phrase: 2, sentence: 0 };
    let job = RewriteJob { pairs: vec![shards.into()], out: out.into(), counts, seed: 1, paraphrases: None, sentences: None };
    rewrite(&job, &|_| ()).unwrap();
}

fn retrieved(folder: &Path) {
    let shards = vec![folder.join("scenes")];
    let job = RetrievalJob {
        pairs: shards.clone(),
        images: shards,
        texts: vec![folder.join("texts.txt")],
        seer: Seer::Backbone(folder.join("backbone.safetensors")),
        features: folder.join("looks"),
        count: 3,
        out: folder.join("retrieved"),
    };
    let report = retrieve(&job, &|_| ()).unwrap();
    assert!(report.found.iter().all(|&found| found >= 10), "{report:?}");
}

fn job(folder: &Path, run: &str) -> TrainingJob {
    let shards = folder.join("scenes");
    let (tokenizer, backbone, texts) =
        (folder.join("tokenizer.json"), folder.join("backbone.safetensors"), folder.join("texts.txt"));
    if !shards.exists() {
        write_corpus(&shards, &CorpusOptions { seed: 5, count: 10, ..Default::default() }).unwrap();
        let line = |i: usize| match i % 4 {
            0 => format!("a {} circle in the background", ["red", "blue", "green", "yellow", "orange"][i / 4]),
            _ => format!("a text about {i} things and {} more", i % 3),
        };
        let lines: Vec<String> = (0..20).map(line).collect();
        std::fs::write(&texts, lines.join("\n")).unwrap();
        std::fs::write(&tokenizer, tokenizer_training::train(lines.iter().map(String::as_str), 300).unwrap()).unwrap();
        std::fs::write(&backbone, backbone::random_file(1).unwrap()).unwrap();
        rewritten(&shards, &folder.join("rewrites"));
        retrieved(folder);
    }
    TrainingJob {
        recipe: Recipe::from_toml(RECIPE).unwrap(),
        size: ModelConfig { dropout: 0.1, ..ModelConfig::named("pico").unwrap() },
        init: None,
        tokenizer,
        backbone: Some(backbone),
        pairs: vec![shards.clone()],
        images: vec![shards],
        regions: Vec::new(),
        texts: vec![texts],
        rewrites: vec![folder.join("rewrites")],
        retrieved: vec![folder.join("retrieved")],
        development: Vec::new(),
        task: None,
        writing: None,
        features: folder.join("features"),
        run: folder.join(run),
        resume: false,
        data_note: "drawn scenes".into(),
        stop_after: None,
        activation_checkpointing: false,
        drawing_threads: 0,
        device: candle_core::Device::Cpu,
    }
}

/// Step and loss of every step in a run's log.
fn curve(run: &Path) -> Vec<(u64, f64)> {
    let log = std::fs::read_to_string(run.join("log.jsonl")).unwrap();
    let entries = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let steps = entries.filter(|entry| entry["development"] != true);
    steps.map(|entry| (entry["step"].as_u64().unwrap(), entry["loss"].as_f64().unwrap())).collect()
}

fn moments(run: &Path) -> std::collections::HashMap<String, candle_core::Tensor> {
    moments_of(&checkpoint::list(&run.join("checkpoints")).unwrap().pop().unwrap())
}

fn moments_of(checkpoint: &Path) -> std::collections::HashMap<String, candle_core::Tensor> {
    candle_core::safetensors::load(checkpoint.join("optimizer.safetensors"), &candle_core::Device::Cpu).unwrap()
}

#[test]
fn every_parameter_gets_a_finite_gradient_that_is_not_zero() {
    let folder = tempfile::tempdir().unwrap();
    for (run, image_embedding, text_embedding) in
        [("token", ImageEmbedding::Token, TextEmbedding::Token), ("pooled", ImageEmbedding::Pooled, TextEmbedding::Both)]
    {
        let mut job = job(folder.path(), run);
        (job.size.image_embedding, job.size.text_embedding) = (image_embedding, text_embedding);
        training::run(&TrainingJob { stop_after: Some(2), ..job.clone() }).unwrap();
        let moments = moments(&job.run);
        for (name, _) in job.size.weights() {
            let second = moments[&format!("{name}.second")].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(second.iter().all(|v| v.is_finite()), "{run} {name}: a gradient is not finite");
            // The second moment is a sum of squared gradients: zero everywhere means that none arrived.
            assert!(second.iter().any(|&v| v > 0.0), "{run} {name}: no gradient arrives");
        }
    }
}

#[test]
fn a_resumed_run_has_the_curve_of_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let whole = job(folder.path(), "whole");
    training::run(&whole).unwrap();
    let expected = curve(&whole.run);
    assert_eq!(expected.len(), 6);

    // Stops after step 5; the newest checkpoint is that of step 4.
    let cut = job(folder.path(), "cut");
    training::run(&TrainingJob { stop_after: Some(5), ..cut.clone() }).unwrap();
    assert_eq!(curve(&cut.run), expected[..5]);
    // What kill -9 leaves in the middle of a checkpoint and of a log line.
    std::fs::create_dir(cut.run.join("checkpoints/step-00000006.tmp")).unwrap();
    let log = std::fs::read_to_string(cut.run.join("log.jsonl")).unwrap();
    std::fs::write(cut.run.join("log.jsonl"), &log[..log.len() - 20]).unwrap();
    training::run(&TrainingJob { resume: true, ..cut.clone() }).unwrap();
    assert_eq!(curve(&cut.run), expected);

    let unsaved = job(folder.path(), "unsaved");
    let told = training::run(&TrainingJob { stop_after: Some(1), ..unsaved }).unwrap_err().to_string();
    assert_eq!(told, "the run ends after step 1, before its first checkpoint: there is one every 2 steps");

    // A run that ends early is the whole one's beginning, with a checkpoint where it ends.
    let mut early = job(folder.path(), "early");
    early.recipe.ends_at = Some(5);
    let last = training::run(&early).unwrap();
    assert_eq!((curve(&early.run).as_slice(), checkpoint::state(&last).unwrap().step), (&expected[..5], 5));
}

#[test]
fn batches_that_several_threads_draw_are_those_of_one_and_in_its_order() {
    let folder = tempfile::tempdir().unwrap();
    // Captions that the model draws need the step before: no thread may be ahead of it.
    let sampling = job(folder.path(), "sampling");
    let mut one = job(folder.path(), "one");
    one.recipe.batch.sampled_captions = 0;
    let four = TrainingJob { drawing_threads: 4, run: folder.path().join("four"), ..one.clone() };
    let threads = |job: &TrainingJob| training::rehearse(job).unwrap().drawing_threads;
    assert_eq!([&sampling, &one, &four].map(threads), [0, 1, 4]);
    for job in [&one, &four] {
        training::run(job).unwrap();
    }
    assert_eq!(curve(&four.run), curve(&one.run));
}

/// Losses by objective of every line of a run's log.
fn losses(run: &Path) -> Vec<BTreeMap<String, f64>> {
    let log = std::fs::read_to_string(run.join("log.jsonl")).unwrap();
    let of_line = |line: &str| {
        let entry: serde_json::Value = serde_json::from_str(line).unwrap();
        entry["objectives"].as_object().unwrap().iter().map(|(name, loss)| (name.clone(), loss.as_f64().unwrap())).collect()
    };
    log.lines().map(of_line).collect()
}

#[test]
fn a_step_in_chunks_or_with_its_activations_thrown_away_teaches_what_one_pass_does() {
    let folder = tempfile::tempdir().unwrap();
    let token = (ImageEmbedding::Token, TextEmbedding::Token);
    let both = (ImageEmbedding::Pooled, TextEmbedding::Both);
    let heads = format!("{HEADS}{POOLED}");
    for (name, recipe, embeddings) in [
        ("frozen", RECIPE, token),
        ("trained", WITH_BACKBONE, token),
        ("pooled", POOLED, (ImageEmbedding::Pooled, TextEmbedding::Token)),
        ("pooled and trained", WITH_BACKBONE, both),
        ("both", POOLED, both),
        ("heads alone", heads.as_str(), both),
    ] {
        let run = |chunks: usize, activation_checkpointing: bool| {
            // Dropout would differ: it goes by a row's place in its pass.
            let run = format!("{name}-{chunks}-{activation_checkpointing}");
            let mut job = TrainingJob { activation_checkpointing, ..job(folder.path(), &run) };
            job.size.dropout = 0.0;
            (job.size.image_embedding, job.size.text_embedding) = embeddings;
            job.recipe = Recipe::from_toml(recipe).unwrap();
            (job.recipe.steps, job.recipe.checkpoint_every) = (2, 1);
            job.recipe.batch.chunks = chunks;
            job.recipe.weights.cross_modal = 0.5;
            training::run(&job).unwrap();
            job.run
        };
        let whole = run(1, false);
        for cut in [run(3, false), run(1, true), run(3, true)] {
            let name = cut.display();
            for (step, (one, many)) in losses(&whole).iter().zip(losses(&cut)).enumerate() {
                assert_eq!(one.keys().collect::<Vec<_>>(), many.keys().collect::<Vec<_>>());
                // Sums in f32, in another order; the second step starts from weights that differ by as much.
                for (objective, loss) in one {
                    let near = (loss - many[objective]).abs() < 1e-4 * (1.0 + loss.abs());
                    assert!(near, "{name} {step} {objective}: {loss} {many:?}");
                }
            }
            // Of the first step: AdamW then moves each weight as far, whichever sign rounding gave the gradient of one that has none, and
            // the backbone's ReLU6 cuts off here and not there.
            let [one, many] = [&whole, &cut].map(|run| moments_of(&checkpoint::list(&run.join("checkpoints")).unwrap()[0]));
            for (weight, moment) in one.iter().filter(|(weight, _)| weight.ends_with(".first")) {
                let scale = moment.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
                let difference = (moment - &many[weight]).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
                let difference = difference.to_scalar::<f32>().unwrap();
                assert!(difference <= 1e-4 * scale + 1e-9, "{name}: {weight} differs by {difference} of {scale}");
            }
        }
    }
}

#[test]
fn a_backbone_is_trained_with_the_model_kept_in_checkpoints_and_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let job = |run: &str| TrainingJob { recipe: Recipe::from_toml(WITH_BACKBONE).unwrap(), ..job(folder.path(), run) };
    let whole = job("whole");
    let last = training::run(&whole).unwrap();
    let expected = curve(&whole.run);
    let cut = job("cut");
    training::run(&TrainingJob { stop_after: Some(3), ..cut.clone() }).unwrap();
    training::run(&TrainingJob { resume: true, ..cut.clone() }).unwrap();
    assert_eq!(curve(&cut.run), expected);

    let moments = moments(&whole.run);
    let backbone = |path: &Path| backbone::Backbone::load(path).unwrap();
    let (given, trained) = (backbone(whole.backbone.as_ref().unwrap()), backbone(&last.join("backbone.safetensors")));
    assert!(given.has_classifier() && !trained.has_classifier());
    for (name, _) in backbone::layer_shapes().into_iter().filter(|(name, _)| name != "classifier") {
        let is_trained = ["block15", "block16", "head"].iter().any(|part| name.starts_with(part));
        assert_eq!(given.layer(&name) != trained.layer(&name), is_trained, "{name}");
        assert_eq!(moments.contains_key(&format!("backbone.{name}.weight.second")), is_trained, "{name}");
    }

    // What starts from this checkpoint sees with its backbone, and takes no other.
    let next = TrainingJob { init: Some(whole.run.clone()), ..job("next") };
    let error = training::run(&next).unwrap_err().to_string();
    assert!(error.contains("a backbone of its own"), "{error}");
    let mut frozen = TrainingJob { backbone: None, ..next };
    frozen.recipe.trained_blocks = 0;
    frozen.recipe.steps = 1;
    let last = training::run(&frozen).unwrap();
    assert_eq!(backbone(&last.join("backbone.safetensors")), trained);
    let fresh = TrainingJob { backbone: None, ..job("fresh") };
    assert!(training::run(&fresh).unwrap_err().to_string().contains("--backbone"));
}

const PLAN: &str = "
title = '# What does the contrast bring?'
size = 'pico'
seeds = [1, 2]
[recipe]
steps = 2
views = 2
evaluate_images = 5
[recipe.batch]
images = 4
captions = 1
contrast_captions = 1
[[variants]]
name = 'all'
[[variants]]
name = 'Without the contrast'
change = { batch = { contrast_captions = 0 }, weights = { contrast = 0.0 } }
";

#[test]
fn an_ablation_compares_every_variant_and_trains_only_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let data = job(folder.path(), "unused");
    let data = TrainingJob { development: data.pairs.clone(), ..data };
    let (plan, out) = (Plan::from_toml(PLAN).unwrap(), folder.path().join("ablation"));
    let table = ablate(&plan, &data, &out).unwrap();
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| ") && line.contains(" ± ")).collect();
    assert!(
        rows.len() == 2 && rows[0].starts_with("| all | 2 |") && rows[1].starts_with("| Without the contrast | 2 |"),
        "{table}"
    );
    assert_eq!(std::fs::read_to_string(out.join("table.md")).unwrap(), table);

    let log = |variant: &str, seed: u64| out.join(format!("{variant}/seed-{seed}/log.jsonl"));
    let curves = ["all", "without-the-contrast"].map(|variant| [1, 2].map(|seed| std::fs::read(log(variant, seed)).unwrap()));
    assert_ne!(curve(log("all", 1).parent().unwrap()), curve(log("all", 2).parent().unwrap()), "the seed changes nothing");
    assert_ne!(curve(log("all", 1).parent().unwrap()), curve(log("without-the-contrast", 1).parent().unwrap()));
    // One run is lost: it alone is trained again, to the same figures.
    std::fs::remove_dir_all(log("all", 2).parent().unwrap()).unwrap();
    assert_eq!(ablate(&plan, &data, &out).unwrap(), table);
    // The log holds times: runs that were not trained again have the very same one.
    assert_eq!(std::fs::read(log("all", 1)).unwrap(), curves[0][0]);
    assert_eq!(std::fs::read(log("without-the-contrast", 2)).unwrap(), curves[1][1]);
    assert_ne!(std::fs::read(log("all", 2)).unwrap(), curves[0][1]);
    let changed = Plan::from_toml(&PLAN.replace("contrast_captions = 1", "contrast_captions = 2")).unwrap();
    assert!(ablate(&changed, &data, &out).unwrap_err().to_string().contains("another recipe"));
    let blind = TrainingJob { development: Vec::new(), ..data };
    assert!(ablate(&plan, &blind, &out).unwrap_err().to_string().contains("--dev"));
}

#[test]
fn a_rehearsal_tells_the_cost_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let job = TrainingJob { recipe: Recipe::from_toml(WITH_BACKBONE).unwrap(), ..job(folder.path(), "run") };
    let told = training::rehearse(&job).unwrap();
    assert!(!job.run.exists());
    let vocabulary = unimo::tokenizer::Tokenizer::from_file(&job.tokenizer).unwrap().vocabulary_size();
    let model = ModelConfig { vocabulary, ..ModelConfig::named("pico").unwrap() }.parameters();
    // Two blocks and the head: 160→960→160, 160→960→320, 320→1280, with biases and depthwise kernels.
    let block = |out: usize| 160 * 960 + 960 + 9 * 960 + 960 + 960 * out + out;
    assert_eq!(told.parameters, [model, block(160) + block(320) + 320 * 1280 + 1280]);
    assert_eq!((told.steps, told.pictures), ([0, 4], 4));
    assert!(told.operations > 1e8 && told.seconds > 0.0 && told.rows > 4 * 50, "{told:?}");
    assert!(told.drawn_alone > 0.0, "{told:?}");
    let said = told.to_string();
    assert!(
        said.contains("to the end   4 steps") && said.contains("pictures a second are drawn and packed by a thread alone"),
        "{said}"
    );
}

#[test]
fn a_run_is_not_overwritten_nor_mixed_with_another() {
    let folder = tempfile::tempdir().unwrap();
    let first = job(folder.path(), "run");
    training::run(&TrainingJob { stop_after: Some(2), ..first.clone() }).unwrap();
    let again = training::run(&first).unwrap_err().to_string();
    assert!(again.contains("--resume"), "{again}");
    let mut other = TrainingJob { resume: true, ..first };
    other.recipe.seed = 99;
    let mixed = training::run(&other).unwrap_err().to_string();
    assert!(mixed.contains("another recipe"), "{mixed}");
    // As many texts, and other ones.
    let same = TrainingJob { resume: true, ..job(folder.path(), "run") };
    let texts = std::fs::read_to_string(&same.texts[0]).unwrap();
    std::fs::write(&same.texts[0], texts.replacen("about", "more about", 1)).unwrap();
    let mixed = training::run(&same).unwrap_err().to_string();
    assert!(mixed.contains("tokenizer or data"), "{mixed}");
}

#[test]
fn rewrites_of_other_captions_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path(), "run");
    let other = folder.path().join("other");
    write_corpus(&other, &CorpusOptions { seed: 6, count: 10, ..Default::default() }).unwrap();
    let refused = |rewrites: Vec<PathBuf>| training::run(&TrainingJob { rewrites, ..job.clone() }).unwrap_err().to_string();
    rewritten(&other, &folder.path().join("foreign"));
    assert!(refused(vec![folder.path().join("foreign")]).contains("none of these pictures"));
    assert!(refused(Vec::new()).contains("--rewrites"));

    let lines = folder.path().join("rewrites/0000-scenes-0000.jsonl");
    let text = std::fs::read_to_string(&lines).unwrap();
    std::fs::write(&lines, text.replacen("\"caption\":\"", "\"caption\":\"not ", 1)).unwrap();
    assert!(refused(vec![folder.path().join("rewrites")]).contains("other captions of"));
}

#[test]
fn a_size_for_other_regions_than_the_backbones_is_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let size = ModelConfig { region_feature: 2048, ..ModelConfig::named("pico").unwrap() };
    let job = TrainingJob { size, ..job(folder.path(), "run") };
    let error = training::run(&job).unwrap_err().to_string();
    assert!(error.contains("1292 features") && error.contains("2048"), "{error}");
    assert!(!job.features.exists());
}
