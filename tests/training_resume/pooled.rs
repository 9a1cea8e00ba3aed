//! Models whose image embedding is pooled: further pairs for the contrast, and embeddings that are trained alone.

use std::collections::BTreeMap;
use std::path::Path;

use unimo_train::model::{ImageEmbedding, TextEmbedding};
use unimo_train::recipe::Recipe;
use unimo_train::training::{self, TrainingJob};

use super::{curve, job, losses, moments};

/// What contrasts pictures by their mean features, further ones among them.
pub const POOLED: &str = "
steps = 4
views = 2
checkpoint_every = 2
evaluate_every = 100
[batch]
images = 3
hidden_regions = 0.1
captions = 2
contrast_captions = 2
contrast_pairs = 7
match_images = 2
match_negatives = 1
retrieved_pairs = 2
retrieved_images = 2
retrieved_texts = 1
[weights]
cross_modal = 0.5
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
";

/// What of a recipe trains the embeddings alone.
pub const HEADS: &str = "trained = ['embed.', 'temperature']\n";

/// A job that trains a model whose image embedding is pooled, its text embedding of both kinds.
fn pooled_job(folder: &Path, run: &str) -> TrainingJob {
    let mut job = job(folder, run);
    job.size.image_embedding = ImageEmbedding::Pooled;
    job.size.text_embedding = TextEmbedding::Both;
    job.recipe = Recipe::from_toml(POOLED).unwrap();
    job
}

#[test]
fn further_pairs_change_the_contrast_alone_and_a_run_with_them_is_resumed_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let whole = pooled_job(folder.path(), "whole");
    training::run(&whole).unwrap();
    let cut = pooled_job(folder.path(), "cut");
    training::run(&TrainingJob { stop_after: Some(3), ..cut.clone() }).unwrap();
    training::run(&TrainingJob { resume: true, ..cut.clone() }).unwrap();
    assert_eq!(curve(&cut.run), curve(&whole.run));

    let mut fewer = pooled_job(folder.path(), "fewer");
    fewer.recipe.batch.contrast_pairs = 0;
    fewer.recipe.ends_at = Some(1);
    training::run(&fewer).unwrap();
    let [with, without] = [&whole, &fewer].map(|job| losses(&job.run).swap_remove(0));
    assert_eq!(with.keys().collect::<Vec<_>>(), without.keys().collect::<Vec<_>>());
    for (objective, loss) in &with {
        // Ten pictures instead of three to choose among; dropout of everything else goes by its row, and further texts come last.
        let other = without[objective];
        assert_eq!(objective == "contrast", (loss - other).abs() > 1e-4, "{objective}: {loss} against {other}");
    }

    // Nothing but further pairs.
    let mut alone = pooled_job(folder.path(), "alone");
    alone.recipe = Recipe::from_toml("steps = 2\nviews = 2\n[batch]\nimages = 0\ncaptions = 0\ncontrast_pairs = 10\n").unwrap();
    training::run(&alone).unwrap();
    assert!(losses(&alone.run).iter().all(|step| step.len() == 1 && step["contrast"] > 1.0));
}

/// Bits of every tensor of a checkpoint's model.
fn weights(checkpoint: &Path) -> BTreeMap<String, Vec<u32>> {
    let tensors = candle_core::safetensors::load(checkpoint.join("model.safetensors"), &candle_core::Device::Cpu).unwrap();
    let bits = |tensor: candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    tensors.into_iter().map(|(name, tensor)| (name, bits(tensor).into_iter().map(f32::to_bits).collect())).collect()
}

#[test]
fn what_a_recipe_does_not_name_stays_as_it_is_to_the_last_bit() {
    let folder = tempfile::tempdir().unwrap();
    let first = pooled_job(folder.path(), "first");
    let started = training::run(&first).unwrap();
    let job = |run: &str| {
        let mut job = TrainingJob { init: Some(started.clone()), backbone: None, ..pooled_job(folder.path(), run) };
        job.recipe = Recipe::from_toml(&format!("{HEADS}{POOLED}")).unwrap();
        // Decay would reach every weight that is optimised.
        job.recipe.optimizer.weight_decay = 0.5;
        job
    };
    let whole = job("whole");
    let (before, after) = (weights(&started), weights(&training::run(&whole).unwrap()));
    let is_trained = |name: &str| name.starts_with("embed.") || name == "temperature";
    for (name, bits) in &before {
        assert_eq!(*bits != after[name], is_trained(name), "{name}");
    }
    let moments = moments(&whole.run);
    assert_eq!(moments.len(), 2 * 5, "{:?}", moments.keys());
    assert!(moments.keys().all(|name| is_trained(name) || name.starts_with("temperature.")), "{:?}", moments.keys());

    let cut = job("cut");
    training::run(&TrainingJob { stop_after: Some(3), ..cut.clone() }).unwrap();
    let mut other = TrainingJob { resume: true, ..cut.clone() };
    other.recipe.trained.truncate(1);
    let error = training::run(&other).unwrap_err().to_string();
    assert!(error.contains("a run of another recipe"), "{error}");
    training::run(&TrainingJob { resume: true, ..cut.clone() }).unwrap();
    assert_eq!(curve(&cut.run), curve(&whole.run));

    let mut unknown = job("unknown");
    unknown.recipe.trained.push("wings.".into());
    let error = training::run(&unknown).unwrap_err().to_string();
    assert!(error.contains("begin with `wings.`"), "{error}");
}

#[test]
fn a_step_of_embeddings_alone_has_no_backward_pass_through_the_layers_and_one_without_activations_two_forward_ones() {
    let folder = tempfile::tempdir().unwrap();
    let operations = |run: &str, trained: &str, activation_checkpointing: bool| -> f64 {
        let mut job = TrainingJob { activation_checkpointing, ..pooled_job(folder.path(), run) };
        let recipe = format!("{trained}steps = 1\nviews = 2\n[batch]\nimages = 0\ncaptions = 0\ncontrast_pairs = 8\n");
        job.recipe = Recipe::from_toml(&recipe).unwrap();
        training::run(&job).unwrap();
        let log = std::fs::read_to_string(job.run.join("log.jsonl")).unwrap();
        serde_json::from_str::<serde_json::Value>(&log).unwrap()["operations"].as_f64().unwrap()
    };
    let heads = operations("heads", HEADS, false);
    assert_eq!(operations("all", "", false), 3.0 * heads);
    assert_eq!(operations("checkpointed", "", true), 4.0 * heads);
    assert_eq!(operations("checkpointed heads", HEADS, true), heads);
}

#[test]
fn further_pairs_are_refused_where_they_cannot_be_had() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |job: TrainingJob| training::run(&job).unwrap_err().to_string();
    let mut token = pooled_job(folder.path(), "token");
    token.size.image_embedding = ImageEmbedding::Token;
    let error = refused(token);
    assert!(error.starts_with("pico embeds a picture's [IMG]") && error.contains("image_embedding = \"pooled\""), "{error}");
    let mut many = pooled_job(folder.path(), "many");
    many.recipe.batch.contrast_pairs = 8;
    let error = refused(many);
    assert!(error.contains("8 contrast_pairs") && error.ends_with("only 10 pictures with captions"), "{error}");
}
