//! Everything a run trains on, in memory: tokenised captions, cached region features, texts.

mod mirroring;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use unimo::tokenizer::{CLS, SEP, Tokenizer};

use crate::detections::{DetectionCache, DetectionFile};
use crate::features::{FeatureCache, FeatureFile, is_mirrored};
use crate::model::RegionStatistics;
use crate::names::Names;
use crate::ops::kernels::add_assign;
use crate::regions::Record;
use crate::retrieval;
use crate::rewriting;
use crate::shards::{self, Damage, Sample};

use mirroring::mirror_text;

/// Pictures' regions: computed from pixels, or detected.
enum PictureFile {
    Grid(FeatureFile),
    Detected(DetectionFile),
}

/// Where to find a picture's features.
#[derive(Debug, Clone, Copy)]
struct PictureRef {
    file: u32,
    index: u32,
}

/// One picture with its captions.
#[derive(Debug, Clone)]
pub struct Pair {
    /// Sample key.
    pub key: String,
    picture: PictureRef,
    /// Ids of each caption, `[CLS] … [SEP]`.
    pub captions: Vec<Vec<u32>>,
    /// The same with left and right exchanged, for mirrored views.
    mirrored: Vec<Vec<u32>>,
    /// The captions as written.
    pub references: Vec<String>,
    /// Rewritten captions that are false of the picture, those of each caption; and for mirrored views. Empty without rewrites.
    rewritten: [Vec<Vec<Vec<u32>>>; 2],
    /// Captions of other pictures for each caption, from the same files.
    sentences: [Vec<Vec<Vec<u32>>>; 2],
    /// Each caption in other words, from the same files.
    paraphrased: [Vec<Vec<Vec<u32>>>; 2],
    /// Texts alone that read like its captions; and for mirrored views.
    retrieved_texts: [Vec<Vec<u32>>; 2],
    /// Images alone that look like it.
    retrieved_images: Vec<usize>,
}

impl Pair {
    fn new(sample: Sample, picture: PictureRef, tokenizer: &Tokenizer, positions: usize) -> Self {
        let ids = |text: &String| text_ids(tokenizer, text, positions);
        Self {
            picture,
            captions: sample.captions.iter().map(ids).collect(),
            mirrored: sample.captions.iter().map(|c| ids(&mirror_text(c))).collect(),
            key: sample.key,
            references: sample.captions,
            rewritten: [Vec::new(), Vec::new()],
            sentences: [Vec::new(), Vec::new()],
            paraphrased: [Vec::new(), Vec::new()],
            retrieved_texts: [Vec::new(), Vec::new()],
            retrieved_images: Vec::new(),
        }
    }

    /// The captions that fit a view.
    #[must_use]
    pub fn captions_for(&self, view: usize) -> &[Vec<u32>] {
        if is_mirrored(view) { &self.mirrored } else { &self.captions }
    }

    /// Captions of other pictures that belong to caption `caption`'s sentence level, as fits a view: taken for false of the picture.
    #[must_use]
    pub fn sentences_for(&self, view: usize, caption: usize) -> &[Vec<u32>] {
        self.sentences[usize::from(is_mirrored(view))].get(caption).map_or(&[], Vec::as_slice)
    }

    /// Caption `caption` in other words, as fits a view: all true of the picture.
    #[must_use]
    pub fn paraphrases_for(&self, view: usize, caption: usize) -> &[Vec<u32>] {
        self.paraphrased[usize::from(is_mirrored(view))].get(caption).map_or(&[], Vec::as_slice)
    }

    /// Texts alone that were retrieved for this pair, as fits a view.
    #[must_use]
    pub fn retrieved_texts(&self, view: usize) -> &[Vec<u32>] {
        &self.retrieved_texts[usize::from(is_mirrored(view))]
    }

    /// Images alone that were retrieved for this pair, by their number in the corpus.
    #[must_use]
    pub fn retrieved_images(&self) -> &[usize] {
        &self.retrieved_images
    }

    /// What caption `caption` was rewritten to, as fits a view: all false of the picture.
    #[must_use]
    pub fn rewrites_for(&self, view: usize, caption: usize) -> &[Vec<u32>] {
        self.rewritten[usize::from(is_mirrored(view))].get(caption).map_or(&[], Vec::as_slice)
    }
}

/// Pictures and their features.
#[derive(Default)]
pub struct Corpus {
    files: Vec<PictureFile>,
    /// Pictures with captions.
    pub pairs: Vec<Pair>,
    images: Vec<PictureRef>,
    /// Number of each image alone, by its key.
    image_names: Names,
    /// Pictures of tables of detected regions, and their numbers by name.
    detected: Vec<PictureRef>,
    detected_names: Names,
    /// Ids of each text alone, `[CLS] … [SEP]`.
    pub texts: Vec<Vec<u32>>,
    /// Records that were skipped.
    pub damaged: Vec<Damage>,
}

/// `[CLS] words [SEP]`, at most `positions` ids.
#[must_use]
pub fn text_ids(tokenizer: &Tokenizer, text: &str, positions: usize) -> Vec<u32> {
    let mut ids = vec![CLS];
    ids.extend(tokenizer.encode(text, positions - 2));
    ids.push(SEP);
    ids
}

impl Corpus {
    /// Adds shards of pictures with captions.
    ///
    /// # Errors
    /// Unreadable shards; damaged records go to [`Corpus::damaged`].
    pub fn add_pairs(
        &mut self,
        paths: &[PathBuf],
        cache: &FeatureCache,
        tokenizer: &Tokenizer,
        positions: usize,
        progress: &dyn Fn(u64),
    ) -> Result<()> {
        for shard in shards::expand(paths)? {
            let shard = [shard];
            let (places, damaged) = self.add_features(&shard, cache, progress)?;
            self.damaged.extend(damaged);
            let pairs = &mut self.pairs;
            let report = shards::read_shards(&shard, |sample| {
                if let (Some(&picture), false) = (places.get(&sample.key), sample.captions.is_empty()) {
                    pairs.push(Pair::new(sample, picture, tokenizer, positions));
                }
                Ok(())
            })?;
            self.note(report.damaged);
        }
        Ok(())
    }

    /// Makes the pictures of tables of detected regions known by their names, for [`Corpus::add_captions`].
    ///
    /// # Errors
    /// Unreadable tables; damaged lines, and pictures that an earlier table holds, go to [`Corpus::damaged`].
    pub fn add_detections(&mut self, tables: &[PathBuf], cache: &DetectionCache, progress: &dyn Fn(u64)) -> Result<()> {
        for (name, place) in self.open_tables(tables, cache, progress)? {
            match self.detected_names.insert(name.clone(), self.detected.len()) {
                None => self.detected.push(place),
                Some(_) => self.note_repeated(name, place),
            }
        }
        Ok(())
    }

    /// Adds shards of captions whose pictures' regions were detected; gives the number of pictures without any. Pictures that the
    /// shards hold themselves are not looked at.
    ///
    /// # Errors
    /// Unreadable shards, or none of their pictures in the tables; damaged records go to [`Corpus::damaged`].
    pub fn add_captions(&mut self, paths: &[PathBuf], tokenizer: &Tokenizer, positions: usize) -> Result<usize> {
        let (before, mut without) = (self.pairs.len(), 0);
        let (pairs, names, places) = (&mut self.pairs, &self.detected_names, &self.detected);
        let report = shards::read_shards(paths, |sample| {
            match names.find(&sample.key) {
                _ if sample.captions.is_empty() => {}
                Some(number) => pairs.push(Pair::new(sample, places[number], tokenizer, positions)),
                None => without += 1,
            }
            Ok(())
        })?;
        self.note(report.damaged);
        if self.pairs.len() == before {
            bail!("none of the {without} pictures with captions is in the tables of detected regions");
        }
        Ok(without)
    }

    /// Adds the pictures of tables of detected regions as images alone.
    ///
    /// # Errors
    /// As [`Corpus::add_detections`].
    pub fn add_detected_images(&mut self, tables: &[PathBuf], cache: &DetectionCache, progress: &dyn Fn(u64)) -> Result<()> {
        for (name, place) in self.open_tables(tables, cache, progress)? {
            match self.image_names.insert(name.clone(), self.images.len()) {
                None => self.images.push(place),
                Some(_) => self.note_repeated(name, place),
            }
        }
        Ok(())
    }

    /// Tells that a picture of a table is left out because an earlier one holds it.
    fn note_repeated(&mut self, name: String, place: PictureRef) {
        if let PictureFile::Detected(file) = &self.files[place.file as usize] {
            let reason = "an earlier table holds this picture".to_owned();
            self.damaged.push(Damage { shard: file.table.clone(), key: name, reason });
        }
    }

    /// Opens tables and gives the name and place of every picture in them.
    fn open_tables(
        &mut self,
        tables: &[PathBuf],
        cache: &DetectionCache,
        progress: &dyn Fn(u64),
    ) -> Result<Vec<(String, PictureRef)>> {
        let mut found = Vec::new();
        for mut file in cache.open(tables, progress)? {
            self.note(std::mem::take(&mut file.damaged));
            let number = self.files.len() as u32;
            found.extend(file.names.drain(..).zip(0..).map(|(name, index)| (name, PictureRef { file: number, index })));
            self.files.push(PictureFile::Detected(file));
        }
        Ok(found)
    }

    /// Adds shards of pictures without captions.
    ///
    /// # Errors
    /// As [`Corpus::add_pairs`].
    pub fn add_images(&mut self, paths: &[PathBuf], cache: &FeatureCache, progress: &dyn Fn(u64)) -> Result<()> {
        let (places, damaged) = self.add_features(paths, cache, progress)?;
        self.damaged.extend(damaged);
        let mut places: Vec<_> = places.into_iter().collect();
        places.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        for (key, place) in places {
            self.image_names.insert(key, self.images.len());
            self.images.push(place);
        }
        Ok(())
    }

    /// Adds a file of texts, one a line.
    ///
    /// # Errors
    /// A file that cannot be read or is not UTF-8.
    pub fn add_texts(&mut self, path: &Path, tokenizer: &Tokenizer, positions: usize) -> Result<()> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the texts {}", path.display()))?;
        self.texts.extend(text.lines().filter(|l| !l.trim().is_empty()).map(|l| text_ids(tokenizer, l, positions)));
        Ok(())
    }

    /// Adds the negatives and the paraphrases of `unimo-train rewrite`; gives the number of pictures that have some.
    ///
    /// # Errors
    /// Rewrites of other captions than the pairs', or of none of these pictures.
    pub fn add_rewrites(&mut self, folder: &Path, tokenizer: &Tokenizer, positions: usize) -> Result<usize> {
        let mut by_key: HashMap<String, _> =
            rewriting::read_rewrites(folder)?.into_iter().map(|picture| (picture.key.clone(), picture)).collect();
        let mut found = 0;
        for pair in &mut self.pairs {
            let Some(picture) = by_key.remove(&pair.key) else { continue };
            if !picture.captions.iter().map(|c| &c.caption).eq(&pair.references) {
                bail!("{} was made of other captions of {}; make it anew with `unimo-train rewrite`", folder.display(), pair.key);
            }
            for mirrored in 0..2 {
                let ids = |text: &String| {
                    let text = if mirrored == 1 { mirror_text(text) } else { text.clone() };
                    text_ids(tokenizer, &text, positions)
                };
                let captions = picture.captions.iter();
                pair.rewritten[mirrored] = captions.clone().map(|c| c.word.iter().chain(&c.phrase).map(ids).collect()).collect();
                pair.sentences[mirrored] = captions.clone().map(|c| c.sentence.iter().map(ids).collect()).collect();
                pair.paraphrased[mirrored] = captions.map(|c| c.paraphrases.iter().map(ids).collect()).collect();
            }
            found += 1;
        }
        if found == 0 {
            bail!("{} holds rewrites of none of these pictures", folder.display());
        }
        Ok(found)
    }

    /// Adds what `unimo-train retrieve` found, texts and, where asked for, images; gives the number of pictures for which it found
    /// something. Images alone must have been added before.
    ///
    /// # Errors
    /// What was retrieved for none of these pictures, or images that are not there.
    pub fn add_retrieved(&mut self, folder: &Path, images: bool, tokenizer: &Tokenizer, positions: usize) -> Result<usize> {
        let mut by_key: HashMap<String, _> =
            retrieval::read_retrieved(folder)?.into_iter().map(|picture| (picture.key.clone(), picture)).collect();
        let mut found = 0;
        for pair in &mut self.pairs {
            let Some(picture) = by_key.remove(&pair.key) else { continue };
            let number = |image: &retrieval::FoundImage| {
                let missing = || format!("{} names the image {}, which --images does not hold", folder.display(), image.key);
                self.image_names.exact(&image.key).with_context(missing)
            };
            if images {
                pair.retrieved_images = picture.images.iter().map(number).collect::<Result<_>>()?;
            }
            for (mirrored, texts) in pair.retrieved_texts.iter_mut().enumerate() {
                let ids = |found: &retrieval::FoundText| {
                    let text = if mirrored == 1 { mirror_text(&found.text) } else { found.text.clone() };
                    text_ids(tokenizer, &text, positions)
                };
                *texts = picture.texts.iter().map(ids).collect();
            }
            found += 1;
        }
        if found == 0 {
            bail!("{} holds nothing for any of these pictures", folder.display());
        }
        Ok(found)
    }

    fn note(&mut self, damaged: Vec<Damage>) {
        for damage in damaged {
            if !self.damaged.contains(&damage) {
                self.damaged.push(damage);
            }
        }
    }

    fn add_features(
        &mut self,
        paths: &[PathBuf],
        cache: &FeatureCache,
        progress: &dyn Fn(u64),
    ) -> Result<(HashMap<String, PictureRef>, Vec<Damage>)> {
        let (files, damaged) = cache.open(paths, progress)?;
        let mut places = HashMap::new();
        for file in files {
            let number = self.files.len() as u32;
            for (index, key) in file.keys.iter().enumerate() {
                places.insert(key.clone(), PictureRef { file: number, index: index as u32 });
            }
            self.files.push(PictureFile::Grid(file));
        }
        Ok((places, damaged))
    }

    /// Number of pictures without captions.
    #[must_use]
    pub fn image_count(&self) -> usize {
        self.images.len()
    }

    /// The image alone of a name (see [`Names::find`]).
    #[must_use]
    pub fn image_named(&self, name: &str) -> Option<usize> {
        self.image_names.find(name)
    }

    /// Cached record of pair `pair` in a view; [`Vision`](crate::vision::Vision) makes region features of it.
    #[must_use]
    pub fn pair_record(&self, pair: usize, view: usize) -> Record {
        self.record(self.pairs[pair].picture, view)
    }

    /// Mean of the standardised features of those regions of pair `pair`'s picture in a view that are `shown`, each asked for in
    /// turn; zeros where none is. The cache must hold region features, as it does for a backbone that is not trained.
    #[must_use]
    pub fn pair_mean(
        &self,
        pair: usize,
        view: usize,
        statistics: &RegionStatistics,
        mut shown: impl FnMut() -> bool,
    ) -> Vec<f32> {
        let (picture, width) = (self.pairs[pair].picture, statistics.mean.len());
        let (mut mean, count) = match &self.files[picture.file as usize] {
            PictureFile::Grid(file) => file.sum(picture.index as usize, view, width, shown),
            PictureFile::Detected(file) => {
                let (record, mut sum, mut count) = (file.get(picture.index as usize), vec![0f32; width], 0);
                for row in record.values.chunks_exact(width).filter(|_| shown()) {
                    add_assign(&mut sum, row);
                    count += 1;
                }
                (sum, count)
            }
        };
        let (share, seen) = (1.0 / count.max(1) as f32, if count > 0 { 1.0 } else { 0.0 });
        for ((value, mean), deviation) in mean.iter_mut().zip(&statistics.mean).zip(&statistics.deviation) {
            *value = (*value * share - mean * seen) / deviation;
        }
        mean
    }

    /// Cached record of a picture without captions.
    #[must_use]
    pub fn image_record(&self, image: usize, view: usize) -> Record {
        self.record(self.images[image], view)
    }

    /// Cached records of about `limit` pictures, evenly spread over those with and those without captions.
    pub fn sampled_records(&self, limit: usize) -> impl Iterator<Item = Record> {
        let (pairs, count) = (self.pairs.len(), self.pairs.len() + self.images.len());
        (0..count).step_by(count.div_ceil(limit).max(1)).map(move |i| match i.checked_sub(pairs) {
            None => self.pair_record(i, 0),
            Some(image) => self.image_record(image, 0),
        })
    }

    fn record(&self, picture: PictureRef, view: usize) -> Record {
        match &self.files[picture.file as usize] {
            PictureFile::Grid(file) => Record::grid(file.get(picture.index as usize, view)),
            PictureFile::Detected(file) => file.get(picture.index as usize),
        }
    }

    /// Views that a pair's picture has in the cache; detected regions have one.
    #[must_use]
    pub fn views(&self, pair: usize) -> usize {
        match &self.files[self.pairs[pair].picture.file as usize] {
            PictureFile::Grid(file) => file.views,
            PictureFile::Detected(_) => 1,
        }
    }

    /// Everything that is trained on, but for the pictures themselves, into a hash.
    pub fn update_hash(&self, hash: &mut Sha256) {
        let mut put = |text: &[u32]| {
            hash.update((text.len() as u64).to_le_bytes());
            text.iter().for_each(|id| hash.update(id.to_le_bytes()));
        };
        for pair in &self.pairs {
            put(&pair.key.bytes().map(u32::from).collect::<Vec<_>>());
            pair.captions.iter().for_each(|ids| put(ids));
            pair.rewritten[0].iter().chain(&pair.paraphrased[0]).flatten().for_each(|ids| put(ids));
            pair.retrieved_texts[0].iter().for_each(|ids| put(ids));
            put(&pair.retrieved_images.iter().map(|&image| image as u32).collect::<Vec<_>>());
        }
        put(&[self.images.len() as u32]);
        self.texts.iter().for_each(|ids| put(ids));
    }

    /// Refuses a corpus that cannot feed what is asked of it.
    ///
    /// # Errors
    /// What is missing, in words.
    pub fn require(&self, pairs: bool, images: bool, texts: bool) -> Result<()> {
        if pairs && self.pairs.is_empty() {
            bail!("the recipe trains on pictures with captions, and none were given with --pairs");
        }
        if images && self.images.is_empty() {
            bail!("the recipe trains on pictures alone (`images_alone`), and none were given with --images");
        }
        if texts && self.texts.is_empty() {
            bail!("the recipe trains on texts alone (`texts`), and none were given with --texts");
        }
        Ok(())
    }
}
