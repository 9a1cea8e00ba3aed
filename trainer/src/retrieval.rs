//! Retrieval from single-modal collections for cross-modal contrastive learning (arXiv 2012.15409, section 2.2): for every
//! picture with captions, images alone that look like it and texts alone that read like its captions.
//!
//! Texts are found by TF-IDF. For images, an inverted index over the classes of their regions, those of a detector or what the
//! backbone's classifier finds in the cells of its grid, gives candidates by overlap; they are ranked by that overlap and the cosine of their mean features together. The paper says
//! which collections and that detected classes and features are used, not how they are weighed: here, equally.

mod looks;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use unimo::tokenizer::normalise;

use crate::features::hex;
use crate::shards::{self, Damage};
use crate::tfidf::TfIdfIndex;
use crate::work_files;
use looks::{Look, Looks};

pub use looks::Seer;

/// File that says what a folder was made of.
const ABOUT: &str = "retrieved.toml";
/// Images with the largest overlap of classes, from which the nearest are chosen.
const CANDIDATES: usize = 200;

/// What to look for, where, and where to put it.
#[derive(Debug, Clone)]
pub struct RetrievalJob {
    /// Shards of pictures with captions, for which is sought.
    pub pairs: Vec<PathBuf>,
    /// Shards of images alone, or tables of their detected regions; may be empty.
    pub images: Vec<PathBuf>,
    /// Files of texts alone, one a line; may be empty.
    pub texts: Vec<PathBuf>,
    /// Who says what pictures show.
    pub seer: Seer,
    /// Folder of the feature cache.
    pub features: PathBuf,
    /// Images, and texts, kept for each picture.
    pub count: usize,
    /// Folder of the result.
    pub out: PathBuf,
}

/// What was done.
#[derive(Debug, Default)]
pub struct RetrievalReport {
    /// Pictures for which was sought now.
    pub pictures: usize,
    /// Files that were there already, whole.
    pub kept: usize,
    /// Files written.
    pub written: usize,
    /// Images and texts found now.
    pub found: [usize; 2],
    /// Records that were skipped.
    pub damaged: Vec<Damage>,
}

/// The line of one picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrievedPicture {
    /// Sample key.
    pub key: String,
    /// Images that look like it, nearest first.
    pub images: Vec<FoundImage>,
    /// Texts that read like one of its captions, nearest first.
    pub texts: Vec<FoundText>,
}

/// An image alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FoundImage {
    /// Its sample key.
    pub key: String,
    /// Mean of the overlap of classes and the cosine of features, both at most 1.
    pub score: f32,
}

/// A text alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FoundText {
    /// As it is in its file.
    pub text: String,
    /// Cosine of the TF-IDF vectors.
    pub score: f32,
}

#[derive(Serialize)]
struct About {
    schema: u32,
    fingerprint: String,
    count: usize,
}

/// Seeks for every picture; files that an earlier, interrupted run has finished are kept. `progress` is called with the number of
/// pictures looked at or sought for.
///
/// # Errors
/// Unusable input, failed writes, a folder made from other data.
pub fn retrieve(job: &RetrievalJob, progress: &(dyn Fn(u64) + Sync)) -> Result<RetrievalReport> {
    if job.images.is_empty() && job.texts.is_empty() {
        bail!("there is nothing to retrieve from: give --images, --texts, or both");
    }
    let mut report = RetrievalReport::default();
    let pair_shards = shards::expand(&job.pairs)?;
    let captions = read_captions(&pair_shards, &mut report.damaged)?;
    let lines = read_texts(&job.texts)?;
    let about = About { schema: 1, fingerprint: fingerprint(job, &captions, &lines)?, count: job.count };
    work_files::claim(&job.out, ABOUT, &about)?;
    let files: Vec<PathBuf> =
        pair_shards.iter().enumerate().map(|(i, shard)| job.out.join(work_files::file_name(i, shard))).collect();
    report.kept = files.iter().filter(|file| file.exists()).count();
    if report.kept == files.len() {
        return Ok(report);
    }
    let texts = (!lines.is_empty()).then(|| TextIndex::new(&lines));
    let (mut images, mut looks) = (None, None);
    if !job.images.is_empty() {
        let opened = Looks::open(&job.seer, &job.features, &mut report.damaged, progress)?;
        images = Some(ImageIndex::new(opened.of_images(&job.images, &mut report.damaged, progress)?));
        looks = Some(opened);
    }
    for (number, file) in files.iter().enumerate().filter(|(_, file)| !file.exists()) {
        let mut seen = HashMap::new();
        if let Some(looks) = &looks {
            let keys: Vec<&str> = captions[number].iter().map(|(key, _)| key.as_str()).collect();
            let found = looks.of_pairs(&pair_shards[number], &keys, &mut report.damaged, progress)?;
            seen = found.into_iter().map(|look| (look.key.clone(), look)).collect();
        }
        let lines: Vec<RetrievedPicture> = captions[number]
            .par_iter()
            .map(|(key, captions)| {
                progress(1);
                let like = |index: &ImageIndex| seen.get(key).map(|look| index.nearest(look, job.count)).unwrap_or_default();
                RetrievedPicture {
                    key: key.clone(),
                    images: images.as_ref().map(like).unwrap_or_default(),
                    texts: texts.as_ref().map(|index| index.nearest(captions, job.count)).unwrap_or_default(),
                }
            })
            .collect();
        report.pictures += lines.len();
        report.found[0] += lines.iter().map(|line| line.images.len()).sum::<usize>();
        report.found[1] += lines.iter().map(|line| line.texts.len()).sum::<usize>();
        work_files::write_lines(file, &lines)?;
        report.written += 1;
    }
    Ok(report)
}

/// Reads every picture of a folder that [`retrieve`] has filled.
///
/// # Errors
/// A folder that holds none, or a damaged line.
pub fn read_retrieved(folder: &Path) -> Result<Vec<RetrievedPicture>> {
    work_files::read_lines(folder, ABOUT, "retrieve")
}

type Captions = Vec<(String, Vec<String>)>;

/// Keys and captions of each shard.
fn read_captions(shards: &[PathBuf], damaged: &mut Vec<Damage>) -> Result<Vec<Captions>> {
    let mut all = Vec::new();
    for shard in shards {
        let mut captions = Vec::new();
        let report = shards::read_shards(std::slice::from_ref(shard), |sample| {
            if !sample.captions.is_empty() {
                captions.push((sample.key, sample.captions));
            }
            Ok(())
        })?;
        damaged.extend(report.damaged);
        all.push(captions);
    }
    if all.iter().all(Vec::is_empty) {
        bail!("the shards hold no captions");
    }
    Ok(all)
}

fn read_texts(files: &[PathBuf]) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read the texts {}", file.display()))?;
        lines.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
    }
    Ok(lines)
}

fn fingerprint(job: &RetrievalJob, captions: &[Captions], lines: &[String]) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(serde_json::to_vec(&(captions, lines))?);
    if !job.images.is_empty() {
        looks::update_hash(&job.seer, &job.images, &mut hash)?;
    }
    Ok(hex(&hash.finalize()[..16]))
}

/// Images by the classes of their regions and by their mean features.
struct ImageIndex {
    looks: Vec<Look>,
    classes: TfIdfIndex,
    /// Mean of all mean features: what every image has in common says nothing.
    centre: Vec<f32>,
}

impl ImageIndex {
    fn new(mut looks: Vec<Look>) -> Self {
        let documents: Vec<&[u32]> = looks.iter().map(|look| look.classes.as_slice()).collect();
        let classes = TfIdfIndex::new(&documents, (0..looks.len() as u32).collect());
        let mut centre = vec![0f32; looks.first().map_or(0, |look| look.mean.len())];
        for look in &looks {
            centre.iter_mut().zip(&look.mean).for_each(|(c, v)| *c += v / looks.len() as f32);
        }
        for look in &mut looks {
            direction(&mut look.mean, &centre);
        }
        Self { looks, classes, centre }
    }

    fn nearest(&self, to: &Look, count: usize) -> Vec<FoundImage> {
        let mut mean = to.mean.clone();
        direction(&mut mean, &self.centre);
        let score = |(image, overlap): (usize, f32)| {
            let look = &self.looks[image];
            let cosine: f32 = look.mean.iter().zip(&mean).map(|(a, b)| a * b).sum();
            FoundImage { key: look.key.clone(), score: 0.5 * (overlap + cosine) }
        };
        // The very picture may be among the images alone.
        let candidates = self.classes.nearest(&to.classes, CANDIDATES + 1).into_iter();
        let mut found: Vec<FoundImage> = candidates.filter(|(image, _)| self.looks[*image].key != to.key).map(score).collect();
        found.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| a.key.cmp(&b.key)));
        found.truncate(count);
        found
    }
}

/// Turns a feature into its direction from the centre, of length 1.
fn direction(feature: &mut [f32], centre: &[f32]) {
    feature.iter_mut().zip(centre).for_each(|(v, c)| *v -= c);
    let norm = feature.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-12);
    feature.iter_mut().for_each(|v| *v /= norm);
}

/// Texts by their words.
struct TextIndex<'a> {
    lines: &'a [String],
    numbers: HashMap<String, u32>,
    index: TfIdfIndex,
}

impl<'a> TextIndex<'a> {
    fn new(lines: &'a [String]) -> Self {
        let mut numbers = HashMap::new();
        let terms: Vec<Vec<u32>> = lines
            .iter()
            .map(|line| {
                let number = |word: String| {
                    let next = numbers.len() as u32;
                    *numbers.entry(word).or_insert(next)
                };
                words(line).map(number).collect()
            })
            .collect();
        let documents: Vec<&[u32]> = terms.iter().map(Vec::as_slice).collect();
        let index = TfIdfIndex::new(&documents, (0..lines.len() as u32).collect());
        Self { lines, numbers, index }
    }

    /// Texts nearest to any of the captions; the captions themselves, and a text that was found already, are left out.
    fn nearest(&self, captions: &[String], count: usize) -> Vec<FoundText> {
        let mut known: HashSet<String> = captions.iter().map(|caption| normalise(caption)).collect();
        let mut found: Vec<(usize, f32)> = Vec::new();
        for caption in captions {
            let terms: Vec<u32> = words(caption).filter_map(|word| self.numbers.get(&word).copied()).collect();
            // Some will be the captions themselves, or one text in several files.
            found.extend(self.index.nearest(&terms, count + 2 * captions.len()));
        }
        found.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let texts = found.into_iter().map(|(line, score)| FoundText { text: self.lines[line].clone(), score });
        texts.filter(|found| known.insert(normalise(&found.text))).take(count).collect()
    }
}

fn words(text: &str) -> impl Iterator<Item = String> {
    let bare = |word: &str| word.trim_matches(|c: char| !c.is_alphanumeric()).to_owned();
    normalise(text).split(' ').map(bare).filter(|word| !word.is_empty()).collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbone::{Backbone, CHANNELS, random_file};
    use crate::detections::{RegionShapes, write_line};
    use crate::scenes::{CorpusOptions, write_corpus};

    #[test]
    fn texts_are_found_by_their_rare_words_and_captions_are_not_their_own_finds() {
        let lines = ["A dog runs.", "the dog runs on grass", "a cat sleeps", "a red boat", "a dog runs"].map(str::to_owned);
        let index = TextIndex::new(&lines);
        let texts = |captions: &[&str], count| -> Vec<String> {
            let captions: Vec<String> = captions.iter().map(|c| (*c).to_owned()).collect();
            index.nearest(&captions, count).into_iter().map(|found| found.text).collect()
        };
        assert_eq!(texts(&["a dog runs"], 1), ["the dog runs on grass"]);
        // Cosines 0.69 (all of the query, in a text of two such words) and 0.50 (one of two words each way).
        assert_eq!(texts(&["one dog", "the boat"], 2), ["A dog runs.", "a red boat"]);
        assert_eq!(texts(&["nothing of it"], 3), [""; 0]);
    }

    fn look(key: &str, classes: &[u32], channel: usize) -> Look {
        let mut mean = vec![0f32; CHANNELS];
        mean[channel] = 1.0;
        Look { key: key.into(), classes: classes.to_vec(), mean }
    }

    #[test]
    fn images_are_found_by_classes_and_told_apart_by_features() {
        let index = ImageIndex::new(vec![
            look("boat", &[1, 1, 2], 0),
            look("other-boat", &[1, 1, 2], 1),
            look("dog", &[7, 7, 8], 0),
            look("self", &[1, 1, 2], 0),
        ]);
        let found = index.nearest(&look("self", &[1, 1, 2], 0), 5);
        let keys: Vec<&str> = found.iter().map(|f| f.key.as_str()).collect();
        assert_eq!(keys, ["boat", "other-boat"]);
        assert!((found[0].score - 1.0).abs() < 1e-5 && found[1].score < 0.5, "{found:?}");
    }

    #[test]
    fn an_interrupted_run_goes_on_and_finds_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        write_corpus(&at("pairs"), &CorpusOptions { seed: 3, count: 12, samples_per_shard: 6, ..Default::default() }).unwrap();
        write_corpus(&at("images"), &CorpusOptions { seed: 4, count: 8, ..Default::default() }).unwrap();
        std::fs::write(at("texts.txt"), "a red circle\na blue square above a green star\n\na dog\n").unwrap();
        std::fs::write(at("backbone"), random_file(1).unwrap()).unwrap();
        let job = RetrievalJob {
            pairs: vec![at("pairs")],
            images: vec![at("images")],
            texts: vec![at("texts.txt")],
            seer: Seer::Backbone(at("backbone")),
            features: at("features"),
            count: 2,
            out: at("out"),
        };
        let whole = retrieve(&job, &|_| ()).unwrap();
        assert_eq!((whole.written, whole.kept, whole.pictures), (2, 0, 12));
        let before = read_retrieved(&job.out).unwrap();
        assert!(before.iter().all(|picture| picture.images.len() == 2 && !picture.texts.is_empty()), "{before:?}");
        // What kill -9 leaves: one file missing, and half of it under another name.
        std::fs::remove_file(job.out.join("0001-scenes-0001.jsonl")).unwrap();
        std::fs::write(job.out.join("0001-scenes-0001.tmp"), "{\"key\":").unwrap();
        let rest = retrieve(&job, &|_| ()).unwrap();
        assert_eq!((rest.written, rest.kept, rest.pictures), (1, 1, 6));
        assert_eq!(read_retrieved(&job.out).unwrap(), before);

        let refused = |job: &RetrievalJob| retrieve(job, &|_| ()).unwrap_err().to_string();
        assert!(refused(&RetrievalJob { count: 3, ..job.clone() }).contains("other settings"));
        assert!(refused(&RetrievalJob { images: Vec::new(), texts: Vec::new(), ..job.clone() }).contains("--images"));
        let mut blind = Backbone::load(&at("backbone")).unwrap();
        blind.forget_classifier();
        std::fs::write(at("blind"), blind.to_bytes().unwrap()).unwrap();
        assert!(refused(&RetrievalJob { seer: Seer::Backbone(at("blind")), out: at("other"), ..job }).contains("no classifier"));
    }

    #[test]
    fn images_are_found_by_what_a_detector_says() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        write_corpus(&at("pairs"), &CorpusOptions { seed: 3, count: 3, ..Default::default() }).unwrap();
        let keys: Vec<String> = read_captions(&shards::expand(&[at("pairs")]).unwrap(), &mut Vec::new()).unwrap()[0]
            .iter()
            .map(|(key, _)| key.clone())
            .collect();
        // Regions as (class, feature); the third picture with captions is in no table.
        let line = |name: &str, regions: &[(usize, f32)]| {
            let boxes: Vec<f32> = regions.iter().flat_map(|_| [0.0, 0.0, 5.0, 5.0]).collect();
            let features: Vec<f32> = regions.iter().flat_map(|(_, v)| [*v, 1.0 - v]).collect();
            let classes = regions.iter().flat_map(|(class, _)| (0..4).map(move |c| if c == *class { 0.7 } else { 0.1 }));
            write_line(name, [9, 9], &boxes, &features, &classes.collect::<Vec<f32>>())
        };
        let pairs = [line(&keys[0], &[(1, 0.0), (2, 0.1)]), line(&keys[1], &[(3, 1.0)])];
        std::fs::write(at("pairs.tsv"), pairs.join("\n")).unwrap();
        let images = [
            line("11", &[(3, 0.9), (3, 1.0)]),
            line("12", &[(1, 0.0)]),
            line("13", &[(2, 1.0), (1, 1.0)]),
            line("14", &[(0, 0.5)]),
        ];
        std::fs::write(at("images.tsv"), images.join("\n")).unwrap();
        let shapes = RegionShapes { features: 2, classes: 4, most: 3 };
        let job = RetrievalJob {
            pairs: vec![at("pairs")],
            images: vec![at("images.tsv")],
            texts: Vec::new(),
            seer: Seer::Detector { tables: vec![at("pairs.tsv")], shapes },
            features: at("features"),
            count: 2,
            out: at("out"),
        };
        let report = retrieve(&job, &|_| ()).unwrap();
        let told: Vec<&str> = report.damaged.iter().map(|damage| damage.key.as_str()).collect();
        assert_eq!(told, [keys[2].as_str()]);
        let found = read_retrieved(&job.out).unwrap();
        let images = |i: usize| found[i].images.iter().map(|image| image.key.as_str()).collect::<Vec<_>>();
        // By the class in common first, and of those the one whose features are alike.
        assert_eq!((images(0), images(1), images(2)), (vec!["12", "13"], vec!["11"], vec![]));
    }
}
