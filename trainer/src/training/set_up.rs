//! From a job to what its steps need: corpus, model, backbone, optimiser, downstream data.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::Device;
use sha2::{Digest, Sha256};
use unimo::tokenizer::Tokenizer;

use super::{Loop, TrainingJob, bar};
use crate::backbone::{Backbone, CHANNELS, FEATURES};
use crate::checkpoint::{self, Companions};
use crate::corpus::Corpus;
use crate::detections::DetectionCache;
use crate::features::{FeatureCache, hex};
use crate::model::{ImageEmbedding, ModelConfig, RegionStatistics, Unimo};
use crate::objectives::{Critic, Source, Vocabulary};
use crate::optimizer::AdamW;
use crate::parallel::{self, Collective, Passes};
use crate::seed;
use crate::tasks::generation::WritingData;
use crate::tasks::{RawExample, TaskData};
use crate::tfidf::TfIdfIndex;
use crate::vision::Vision;

/// Tokens after which captions and texts alone are cut off.
const LONGEST_TEXT: usize = 48;
/// Pictures from which the statistics of the region features are taken.
const STATISTICS_PICTURES: usize = 1000;

/// Tells the user, once for all ranks.
fn say(ranks: &dyn Collective, sentence: String) {
    if ranks.rank() == 0 {
        eprintln!("{sentence}");
    }
}

/// Loads what the job trains on.
fn load_corpus(
    job: &TrainingJob,
    tokenizer: &Tokenizer,
    vision: &Vision,
    config: &ModelConfig,
    ranks: &dyn Collective,
) -> Result<(Corpus, Corpus)> {
    let spinner = bar(ranks, 0, "features: {pos} pictures, {elapsed}");
    let progress = |n: u64| spinner.inc(n);
    let (batch, positions) = (&job.recipe.batch, config.positions.min(LONGEST_TEXT));
    let of_task = job.task.as_ref().is_some_and(|task| task.spec.pictures);
    let images_alone = (batch.images_alone > 0 || batch.retrieved_images > 0 || of_task) && !job.images.is_empty();
    let (mut corpus, mut development) = (Corpus::default(), Corpus::default());
    if config.detects() {
        let cache = DetectionCache { folder: &job.features, shapes: config.region_shapes() };
        for (corpus, shards) in [(&mut corpus, &job.pairs), (&mut development, &job.development)] {
            if !shards.is_empty() {
                corpus.add_detections(&job.regions, &cache, &progress)?;
                let without = corpus.add_captions(shards, tokenizer, positions)?;
                if without > 0 {
                    say(
                        ranks,
                        format!(
                            "{without} pictures with captions left out: their regions are in none of the tables of --regions"
                        ),
                    );
                }
            }
        }
        if images_alone {
            corpus.add_detected_images(&job.images, &cache, &progress)?;
        }
    } else {
        let (backbone, trained_blocks) = (vision.given()?, vision.trained_blocks());
        let cache = |views| FeatureCache { folder: &job.features, backbone, trained_blocks, views };
        corpus.add_pairs(&job.pairs, &cache(job.recipe.views), tokenizer, positions, &progress)?;
        if images_alone {
            corpus.add_images(&job.images, &cache(job.recipe.views.min(2)), &progress)?;
        }
        if !job.development.is_empty() {
            development.add_pairs(&job.development, &cache(1), tokenizer, positions, &progress)?;
        }
    }
    add_texts(job, &mut corpus, tokenizer, positions)?;
    spinner.finish_and_clear();
    let mut told = HashSet::new();
    for damage in corpus.damaged.iter().chain(&development.damaged) {
        if told.insert((&damage.shard, &damage.key, &damage.reason)) {
            say(ranks, format!("skipped: {} in {}: {}", damage.key, damage.shard.display(), damage.reason));
        }
    }
    corpus.require(batch.images + batch.contrast_pairs > 0, batch.images_alone > 0, batch.texts + batch.fragment_texts > 0)?;
    let counts = [corpus.pairs.len(), corpus.image_count(), corpus.texts.len(), development.pairs.len(), told.len()];
    let [pairs, images, texts, development_pairs, skipped] = counts;
    say(
        ranks,
        format!(
            "{pairs} pictures with captions, {images} alone, {texts} texts alone, {development_pairs} for development; \
             {skipped} records skipped"
        ),
    );
    Ok((corpus, development))
}

/// Adds what the recipe asks for of rewritten captions, retrieved images and texts, and texts alone.
fn add_texts(job: &TrainingJob, corpus: &mut Corpus, tokenizer: &Tokenizer, positions: usize) -> Result<()> {
    let batch = &job.recipe.batch;
    if batch.match_rewrites + batch.match_sentences + batch.match_paraphrases > 0 {
        if job.rewrites.is_empty() {
            bail!(
                "the recipe trains on rewritten captions (`match_rewrites`, `match_sentences`, `match_paraphrases`), and none were given \
                 with --rewrites"
            );
        }
        for folder in &job.rewrites {
            corpus.add_rewrites(folder, tokenizer, positions)?;
        }
    }
    if batch.retrieved_pairs > 0 {
        if job.retrieved.is_empty() {
            bail!("the recipe trains on retrieved images and texts (`retrieved_pairs`), and none were given with --retrieved");
        }
        for folder in &job.retrieved {
            corpus.add_retrieved(folder, batch.retrieved_images > 0, tokenizer, positions)?;
        }
    }
    if batch.texts + batch.fragment_texts > 0 {
        for file in &job.texts {
            corpus.add_texts(file, tokenizer, positions)?;
        }
    }
    Ok(())
}

/// Refuses what a model of detected regions cannot use, and what it alone uses.
fn check_regions(job: &TrainingJob, config: &ModelConfig) -> Result<()> {
    if !config.detects() {
        if !job.regions.is_empty() {
            bail!(
                "{} sees the cells of a grid; --regions are for a size with `detected_regions`, as base and large",
                config.name
            );
        }
        return Ok(());
    }
    if job.regions.is_empty() && !(job.pairs.is_empty() && job.development.is_empty()) {
        bail!("{} sees detected regions: give the tables that hold those of the pictures with --regions", config.name);
    }
    if job.backbone.is_some() {
        bail!("{} sees detected regions and has no backbone; leave --backbone out", config.name);
    }
    if job.recipe.trained_blocks > 0 {
        bail!("{} sees detected regions: there is no backbone whose blocks `trained_blocks` could train", config.name);
    }
    Ok(())
}

/// Refuses further pairs for the contrast where a model needs more of a picture than the mean of its features.
fn check_contrast_pairs(job: &TrainingJob, config: &ModelConfig) -> Result<()> {
    if job.recipe.batch.contrast_pairs > 0 && config.image_embedding != ImageEmbedding::Pooled {
        bail!(
            "{} embeds a picture's [IMG], for which all layers have to run: contrast_pairs are for a size with `image_embedding = \"pooled\"`",
            config.name
        );
    }
    Ok(())
}

/// Everything that decides the loss curve, hashed: a run resumes only as what it was.
fn fingerprint(job: &TrainingJob, config: &ModelConfig, corpus: &Corpus) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(toml::to_string(&job.recipe)?);
    hash.update(toml::to_string(config)?);
    hash.update(std::fs::read(&job.tokenizer)?);
    corpus.update_hash(&mut hash);
    if let Some(task) = &job.task {
        hash.update(toml::to_string(&task.spec)?);
        task.train.iter().for_each(|example| hash.update(format!("{example:?}")));
    }
    if let Some([train, _]) = &job.writing {
        train.iter().for_each(|example| hash.update(format!("{}\t{}\n", example.source, example.target)));
    }
    Ok(hex(&hash.finalize()[..16]))
}

/// A job set up: what its steps need, and where it stands.
pub(super) struct Ready<'a> {
    pub(super) trainer: Loop<'a>,
    pub(super) optimizer: AdamW,
    pub(super) judged_by: JudgedBy<'a>,
    pub(super) companions: Companions,
    pub(super) step: u64,
}

/// What a run is judged by on its way.
pub(super) struct JudgedBy<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    /// Pictures with captions; may be empty.
    pub(super) development: &'a Corpus,
    /// Development examples of the downstream task.
    pub(super) examples: Option<&'a TaskData>,
    /// Development examples of writing.
    pub(super) to_write: Option<&'a WritingData>,
}

/// Loads everything that the steps of a job need, at the newest of its `existing` checkpoints, and hands it to `work`. Nothing is
/// written but the feature cache.
pub(super) fn set_up<R>(
    job: &TrainingJob,
    existing: &[PathBuf],
    ranks: &dyn Collective,
    work: impl FnOnce(Ready) -> Result<R>,
) -> Result<R> {
    let passes = Passes::of_rank(&job.recipe.batch, ranks)?;
    let device = &job.device;
    let tokenizer = Tokenizer::from_file(&job.tokenizer)?;
    let mut model = initial_model(job, existing.last(), &tokenizer, device)?;
    check_regions(job, model.config())?;
    check_contrast_pairs(job, model.config())?;
    let (mut backbone, mut vision) = (None, Vision::detected());
    if !model.config().detects() {
        let file = backbone_file(job, existing.last())?;
        vision = Vision::new(Backbone::from_bytes(&file)?, job.recipe.trained_blocks, device)?;
        backbone = Some(file);
        if model.config().region_feature != FEATURES {
            bail!("the backbone makes {FEATURES} features of a region, the model takes {}", model.config().region_feature);
        }
    }
    // Rank 0 fills the feature cache, and the others find it full.
    let load = || load_corpus(job, &tokenizer, &vision, model.config(), ranks);
    let (corpus, development) = parallel::first_rank_first(ranks, load)?;
    if existing.is_empty() && job.init.is_none() {
        let regions = vision.regions(corpus.sampled_records(STATISTICS_PICTURES).collect())?;
        let mut statistics = RegionStatistics::of(model.config().region_feature, regions.into_iter().map(|r| r.values));
        if !model.config().detects() {
            statistics.emphasise(CHANNELS..FEATURES, model.config().colour_emphasis as f32);
        }
        model.set_statistics(statistics)?;
    }
    let mut task = None;
    if let Some(of_job) = &job.task {
        let classes = of_job.spec.classes.len();
        if existing.is_empty() {
            model = model.with_task(classes, seed::mix(job.recipe.seed, 0x7a5c))?;
        }
        let data = |raw: &[RawExample]| -> Result<Option<TaskData>> {
            if raw.is_empty() {
                return Ok(None);
            }
            let data = TaskData::new(&of_job.spec, raw.to_vec(), &corpus, &tokenizer, model.config().positions)?;
            if data.without_picture > 0 {
                let (without, all) = (data.without_picture, raw.len());
                say(ranks, format!("{without} of {all} examples left out: their pictures are not among --images"));
            }
            Ok(Some(data))
        };
        task = Some((data(&of_job.train)?.context("the task has no training examples")?, data(&of_job.development)?));
    } else if job.recipe.batch.task_examples > 0 && job.writing.is_none() {
        bail!("the recipe learns a downstream task (`task_examples`), and none was given");
    }
    model.train_only(&job.recipe.trained)?;
    model.set_activation_checkpointing(job.activation_checkpointing);
    // With others, a layer's gradients are summed while the pass goes on.
    model.set_backward_by_layer(ranks.ranks() > 1);
    let positions = model.config().positions;
    let writing = job.writing.as_ref().map(|both| both.each_ref().map(|raw| WritingData::new(raw, &tokenizer, positions)));
    let fingerprint = fingerprint(job, model.config(), &corpus)?;
    parallel::agree(ranks, "model size, tokenizer or data", fingerprint.as_bytes())?;
    let mut optimizer = AdamW::new(job.recipe.optimizer.clone(), model.trained().chain(vision.weights()));
    let mut step = 0;
    if let Some(last) = existing.last() {
        let state = checkpoint::state(last)?;
        if state.fingerprint != fingerprint {
            bail!("{} is a run of another recipe, tokenizer or data; start a new one with another --out", job.run.display());
        }
        checkpoint::restore_optimizer(last, &mut optimizer, &state)?;
        step = state.step;
        say(ranks, format!("going on after step {step}"));
    }

    let texts: Vec<&[u32]> = corpus.pairs.iter().flat_map(|p| p.captions.iter().map(Vec::as_slice)).collect();
    let first_text: Vec<usize> = corpus
        .pairs
        .iter()
        .scan(0, |next, p| {
            let first = *next;
            *next += p.captions.len();
            Some(first)
        })
        .collect();
    let image_of: Vec<u32> = corpus.pairs.iter().enumerate().flat_map(|(i, p)| vec![i as u32; p.captions.len()]).collect();
    let tfidf = (job.recipe.batch.match_images > 0).then(|| TfIdfIndex::new(&texts, image_of));
    let critic = (job.recipe.batch.sampled_captions > 0).then(|| Critic::new(&corpus, &tokenizer));
    let source = Source {
        corpus: &corpus,
        tfidf: tfidf.as_ref(),
        first_text: &first_text,
        vision: &vision,
        vocabulary: &Vocabulary::of(&tokenizer),
        task: task.as_ref().map(|(train, _)| train),
        writing: writing.as_ref().map(|[train, _]| train),
        critic: critic.as_ref(),
    };
    let companions = Companions {
        tokenizer: job.tokenizer.clone(),
        backbone,
        task: job.task.as_ref().map(|task| toml::to_string(&task.spec)).transpose()?,
        training: training_note(job, &corpus)?,
    };
    let trainer = Loop { job, model, source, fingerprint, ranks, passes };
    if ranks.ranks() > 1 {
        parallel::agree(ranks, "checkpoint to go on from or to start from", &trainer.hash_of_weights(&optimizer)?)?;
    }
    let examples = task.as_ref().and_then(|(_, development)| development.as_ref());
    let to_write = writing.as_ref().map(|[_, development]| development).filter(|data| !data.examples.is_empty());
    let judged_by = JudgedBy { tokenizer: &tokenizer, development: &development, examples, to_write };
    work(Ready { trainer, optimizer, judged_by, companions, step })
}

fn initial_model(job: &TrainingJob, resumed: Option<&PathBuf>, tokenizer: &Tokenizer, device: &Device) -> Result<Unimo> {
    let model = match resumed.or(job.init.as_ref()) {
        Some(path) => Unimo::load(&checkpoint::resolve(path)?, device)?,
        None => {
            let size = ModelConfig { vocabulary: tokenizer.vocabulary_size(), ..job.size.clone() };
            Unimo::new(size, job.recipe.seed, device)?
        }
    };
    if model.config().vocabulary != tokenizer.vocabulary_size() {
        bail!("the tokenizer has {} tokens, the model {}", tokenizer.vocabulary_size(), model.config().vocabulary);
    }
    Ok(model)
}

/// The backbone's file: that of the checkpoint to go on with or to start from, else the job's.
fn backbone_file(job: &TrainingJob, resumed: Option<&PathBuf>) -> Result<Vec<u8>> {
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("cannot read the backbone {}", path.display()));
    let given = job.backbone.as_deref().map(read).transpose()?;
    if let Some(resumed) = resumed {
        return read(&resumed.join("backbone.safetensors"));
    }
    let Some(init) = &job.init else {
        return given.context("a fresh model needs a backbone: give --backbone");
    };
    let own = read(&checkpoint::resolve(init)?.join("backbone.safetensors"))?;
    if given.is_some_and(|given| given != own) {
        bail!("{} has a backbone of its own, which is not the one given; leave --backbone out", init.display());
    }
    Ok(own)
}

fn training_note(job: &TrainingJob, corpus: &Corpus) -> Result<String> {
    let mut note = toml::Table::new();
    let mut put = |key: &str, value: toml::Value| note.insert(key.to_owned(), value);
    put("data", job.data_note.clone().into());
    put("pairs", (corpus.pairs.len() as i64).into());
    put("images_alone", (corpus.image_count() as i64).into());
    put("texts_alone", (corpus.texts.len() as i64).into());
    put("steps", (job.recipe.last_step() as i64).into());
    put("images_per_step", (job.recipe.batch.images as i64).into());
    if let Some(init) = &job.init {
        let folder = checkpoint::resolve(init)?;
        let before = std::fs::read_to_string(folder.join("training.toml")).unwrap_or_default();
        put("initialised_from", toml::Value::Table(before.parse().unwrap_or_default()));
    }
    Ok(toml::to_string(&note)?)
}
