//! Negatives of whole corpora as files beside the shards: one JSON object a picture, one file a shard, resumable.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::rewriter::{Counts, Rewriter};
use crate::features::hex;
use crate::shards::{self, Damage};
use crate::work_files;

/// File that says what a folder of rewrites was made of.
const ABOUT: &str = "rewrites.toml";

/// What to rewrite, and where to put it.
#[derive(Debug, Clone)]
pub struct RewriteJob {
    /// Shards (or folders of shards) of pictures with captions.
    pub pairs: Vec<PathBuf>,
    /// Folder of the result.
    pub out: PathBuf,
    /// Negatives of each caption.
    pub counts: Counts,
    /// Seed of the draws.
    pub seed: u64,
    /// JSON lines `{"caption": …, "paraphrases": […]}`: back-translations, or any other way of saying the same.
    pub paraphrases: Option<PathBuf>,
    /// By each picture's key, captions for the sentence level ([`nearest_captions`](super::nearest_captions)); without them those are taken
    /// that read most alike.
    pub sentences: Option<HashMap<String, Vec<String>>>,
}

/// What was done.
#[derive(Debug, Default)]
pub struct RewriteReport {
    /// Captions rewritten now.
    pub captions: usize,
    /// Files that were there already, whole.
    pub kept: usize,
    /// Files written.
    pub written: usize,
    /// Negatives made now, by level: word, phrase, sentence.
    pub negatives: [usize; 3],
    /// Captions of which not one word could be replaced.
    pub barren: usize,
    /// Records that were skipped.
    pub damaged: Vec<Damage>,
}

/// The line of one picture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewrittenPicture {
    /// Sample key.
    pub key: String,
    /// Its captions, in the shard's order.
    pub captions: Vec<RewrittenCaption>,
}

/// One caption and what was made of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewrittenCaption {
    /// As written.
    pub caption: String,
    /// One word replaced.
    pub word: Vec<String>,
    /// One noun phrase, or two words, replaced.
    pub phrase: Vec<String>,
    /// Captions of other pictures that read most alike, or are nearest to this one by a model.
    pub sentence: Vec<String>,
    /// The same in other words, from the file of paraphrases.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paraphrases: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct About {
    schema: u32,
    fingerprint: String,
    seed: u64,
    counts: Counts,
}

struct Picture {
    key: String,
    shard: usize,
}

#[derive(Deserialize)]
struct Paraphrased {
    caption: String,
    paraphrases: Vec<String>,
}

/// Rewrites every caption of the shards; files that an earlier, interrupted run has finished are kept. `progress` is called with
/// the number of captions done.
///
/// # Errors
/// Unusable input, failed writes, a folder that holds rewrites of other captions or by other settings.
pub fn rewrite(job: &RewriteJob, progress: &(dyn Fn(u64) + Sync)) -> Result<RewriteReport> {
    let shards = shards::expand(&job.pairs)?;
    let mut report = RewriteReport::default();
    let (mut pictures, mut captions) = (Vec::new(), Vec::new());
    for (number, shard) in shards.iter().enumerate() {
        let found = shards::read_shards(std::slice::from_ref(shard), |sample| {
            if !sample.captions.is_empty() {
                pictures.push(Picture { key: sample.key, shard: number });
                captions.push(sample.captions);
            }
            Ok(())
        })?;
        report.damaged.extend(found.damaged);
    }
    if captions.is_empty() {
        bail!("the shards hold no captions");
    }
    let paraphrases = job.paraphrases.as_deref().map(read_paraphrases).transpose()?.unwrap_or_default();
    claim(job, &pictures, &captions, &paraphrases)?;
    let files: Vec<PathBuf> = shards.iter().enumerate().map(|(i, shard)| job.out.join(work_files::file_name(i, shard))).collect();
    report.kept = files.iter().filter(|file| file.exists()).count();
    if report.kept == files.len() {
        return Ok(report);
    }
    let rewriter = Rewriter::new(&captions);
    for (number, file) in files.iter().enumerate().filter(|(_, file)| !file.exists()) {
        let of_shard: Vec<usize> = (0..pictures.len()).filter(|&p| pictures[p].shard == number).collect();
        let lines: Vec<RewrittenPicture> = of_shard
            .par_iter()
            .map(|&picture| {
                let rewritten = captions[picture].iter().enumerate().map(|(i, caption)| {
                    let made = rewriter.negatives(picture, i, job.counts, job.seed);
                    progress(1);
                    RewrittenCaption {
                        caption: caption.clone(),
                        word: made.word,
                        phrase: made.phrase,
                        sentence: match &job.sentences {
                            None => made.sentence,
                            // Dealt out among its captions, which are about as near as each other.
                            Some(found) => {
                                let others = found.get(&pictures[picture].key).into_iter().flatten();
                                let others = others.skip(i).step_by(captions[picture].len());
                                others.take(job.counts.sentence).cloned().collect()
                            }
                        },
                        paraphrases: paraphrases.get(caption).cloned().unwrap_or_default(),
                    }
                });
                RewrittenPicture { key: pictures[picture].key.clone(), captions: rewritten.collect() }
            })
            .collect();
        for caption in lines.iter().flat_map(|line| &line.captions) {
            report.captions += 1;
            report.barren += usize::from(job.counts.word > 0 && caption.word.is_empty());
            for (sum, made) in report.negatives.iter_mut().zip([&caption.word, &caption.phrase, &caption.sentence]) {
                *sum += made.len();
            }
        }
        work_files::write_lines(file, &lines)?;
        report.written += 1;
    }
    Ok(report)
}

/// Makes the folder this job's, or refuses it.
fn claim(
    job: &RewriteJob,
    pictures: &[Picture],
    captions: &[Vec<String>],
    paraphrases: &HashMap<String, Vec<String>>,
) -> Result<()> {
    let mut hash = Sha256::new();
    for (picture, captions) in pictures.iter().zip(captions) {
        hash.update(serde_json::to_vec(&(picture.shard, &picture.key, captions))?);
    }
    let mut sorted: Vec<_> = paraphrases.iter().collect();
    sorted.sort_unstable();
    hash.update(serde_json::to_vec(&sorted)?);
    if let Some(sentences) = &job.sentences {
        let mut sorted: Vec<_> = sentences.iter().collect();
        sorted.sort_unstable();
        hash.update(serde_json::to_vec(&sorted)?);
    }
    let about = About { schema: 1, fingerprint: hex(&hash.finalize()[..16]), seed: job.seed, counts: job.counts };
    work_files::claim(&job.out, ABOUT, &about)
}

fn read_paraphrases(path: &Path) -> Result<HashMap<String, Vec<String>>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the paraphrases {}", path.display()))?;
    let mut paraphrases: HashMap<String, Vec<String>> = HashMap::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line: Paraphrased =
            serde_json::from_str(line).with_context(|| format!("line {} of {}", number + 1, path.display()))?;
        paraphrases.entry(line.caption).or_default().extend(line.paraphrases);
    }
    Ok(paraphrases)
}

/// Reads every picture of a folder of rewrites.
///
/// # Errors
/// A folder that holds none, or a damaged line.
pub fn read_rewrites(folder: &Path) -> Result<Vec<RewrittenPicture>> {
    work_files::read_lines(folder, ABOUT, "rewrite")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenes::{Colour, CorpusOptions, Shape, write_corpus};

    fn job(folder: &Path) -> RewriteJob {
        let shards = folder.join("scenes");
        if !shards.exists() {
            write_corpus(&shards, &CorpusOptions { seed: 3, count: 90, samples_per_shard: 30, ..Default::default() }).unwrap();
        }
        let counts = Counts { word: 2, phrase: 2, sentence: 1 };
        RewriteJob { pairs: vec![shards], out: folder.join("rewrites"), counts, seed: 1, paraphrases: None, sentences: None }
    }

    #[test]
    fn sentences_that_are_given_are_dealt_out_among_a_pictures_captions() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path());
        rewrite(&job, &|_| ()).unwrap();
        let keys = read_rewrites(&job.out).unwrap().into_iter().map(|picture| picture.key);
        let near: Vec<String> = (0..12).map(|rank| format!("rank {rank}")).collect();
        let sentences = Some(keys.skip(1).map(|key| (key, near.clone())).collect());
        let counts = Counts { word: 0, phrase: 0, sentence: 2 };
        let job = RewriteJob { sentences, counts, out: folder.path().join("near"), ..job };
        rewrite(&job, &|_| ()).unwrap();
        let dealt = read_rewrites(&job.out).unwrap();
        // A picture without any, as a damaged one, has none.
        assert!(dealt[0].captions.iter().all(|caption| caption.sentence.is_empty()));
        for (i, caption) in dealt[1].captions.iter().enumerate() {
            assert_eq!(caption.sentence, [i, i + 5].map(|rank| format!("rank {rank}")));
        }
    }

    #[test]
    fn an_interrupted_run_goes_on_and_makes_the_same_files() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path());
        let whole = rewrite(&job, &|_| ()).unwrap();
        assert_eq!((whole.written, whole.kept, whole.captions), (3, 0, 450));
        let before = read_rewrites(&job.out).unwrap();
        assert_eq!(before.len(), 90);
        // What kill -9 leaves: one file missing, and half of it under another name.
        std::fs::remove_file(job.out.join("0001-scenes-0001.jsonl")).unwrap();
        std::fs::write(job.out.join("0001-scenes-0001.tmp"), "{\"key\":").unwrap();
        let rest = rewrite(&job, &|_| ()).unwrap();
        assert_eq!((rest.written, rest.kept, rest.captions), (1, 2, 150));
        assert_eq!(read_rewrites(&job.out).unwrap(), before);

        let other = RewriteJob { seed: 2, ..job.clone() };
        assert!(rewrite(&other, &|_| ()).unwrap_err().to_string().contains("other settings"));
        let empty = read_rewrites(folder.path()).unwrap_err().to_string();
        assert!(empty.contains("unimo-train rewrite"), "{empty}");
    }

    /// On drawn scenes the truth is known: a negative must be false of its scene.
    #[test]
    fn negatives_are_false_of_the_scene() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path());
        let report = rewrite(&job, &|_| ()).unwrap();
        let (records, _) = crate::scenes::read_records(&job.pairs).unwrap();
        let pictures = read_rewrites(&job.out).unwrap();
        let (mut wrong, mut judged) = (Vec::new(), 0);
        // Replacements that the scenes can judge; "side" for "background" is none.
        let judges = |word: &str| Shape::from_word(word).is_some() || Colour::from_word(word).is_some();
        for ((key, record), picture) in records.iter().zip(&pictures) {
            assert_eq!(key, &picture.key);
            for caption in &picture.captions {
                for text in caption.word.iter().chain(&caption.phrase) {
                    if !text.split([' ', ',', '.']).any(|word| !caption.caption.contains(word) && judges(word)) {
                        continue;
                    }
                    let check = crate::scenes::check_caption(&record.graph, text);
                    judged += 1;
                    // A caption need not name every object; what it names must be there.
                    if check.wrong.is_empty() && check.false_claims.is_empty() {
                        wrong.push(format!("{text} (of {})", caption.caption));
                    }
                }
            }
        }
        assert!(report.barren * 20 < report.captions, "{} of {} captions offer no word", report.barren, report.captions);
        assert!(
            judged > 300 && wrong.len() * 20 < judged,
            "{} of {judged} are true: {:?}",
            wrong.len(),
            &wrong[..wrong.len().min(12)]
        );
    }

    #[test]
    fn paraphrases_are_read_with_the_line_of_a_fault() {
        let folder = tempfile::tempdir().unwrap();
        let mut job = job(folder.path());
        let file = folder.path().join("p.jsonl");
        let (mut caption, mut first) = (String::new(), true);
        shards::read_shards(&job.pairs, |sample| {
            if std::mem::take(&mut first) {
                caption = sample.captions[0].clone();
            }
            Ok(())
        })
        .unwrap();
        std::fs::write(&file, format!("{}\n", serde_json::json!({"caption": caption, "paraphrases": ["the same"]}))).unwrap();
        job.paraphrases = Some(file.clone());
        rewrite(&job, &|_| ()).unwrap();
        assert_eq!(read_rewrites(&job.out).unwrap()[0].captions[0].paraphrases, ["the same"]);
        std::fs::write(&file, "\n{\"caption\": 1}\n").unwrap();
        let error = format!("{:#}", rewrite(&job, &|_| ()).unwrap_err());
        assert!(error.contains("line 2 of"), "{error}");
    }
}
