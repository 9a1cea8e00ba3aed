//! What a pass is asked, of drawn scenes and of made-up detections.

use candle_core::Device;

use super::super::masked_regions::MaskedRegions;
use super::super::testing::{six_scenes, source};
use super::super::{Orders, StepBatch, Vocabulary};
use super::*;
use crate::detections::{DetectionCache, write_line};
use crate::model::{ModelConfig, Unimo};
use crate::recipe::Recipe;
use crate::rewriting::{Counts, RewriteJob, nearest_captions, rewrite};
use crate::shards::read_shards;
use crate::vision::Vision;

#[test]
fn rewritten_captions_are_false_and_paraphrases_true_of_their_picture() {
    let folder = tempfile::tempdir().unwrap();
    let (mut corpus, backbone, tokenizer) = six_scenes(folder.path(), 0);
    let (shards, paraphrases) = (folder.path().join("scenes"), folder.path().join("paraphrases.jsonl"));
    let mut lines = String::new();
    read_shards(std::slice::from_ref(&shards), |sample| {
        for caption in &sample.captions {
            lines += &serde_json::json!({ "caption": caption, "paraphrases": [format!("in short, {caption}")] }).to_string();
            lines.push('\n');
        }
        Ok(())
    })
    .unwrap();
    std::fs::write(&paraphrases, lines).unwrap();
    let config = ModelConfig { vocabulary: tokenizer.vocabulary_size(), ..ModelConfig::named("pico").unwrap() };
    let model = Unimo::new(config, 1, &Device::Cpu).unwrap();
    let vision = Vision::new(backbone, 0, &Device::Cpu).unwrap();
    let nearest = nearest_captions(&model, &vision, &corpus, 5).unwrap();
    let (counts, out) = (Counts { word: 2, phrase: 0, sentence: 1 }, folder.path().join("rewrites"));
    let job = RewriteJob {
        pairs: vec![shards],
        out: out.clone(),
        counts,
        seed: 1,
        paraphrases: Some(paraphrases),
        sentences: Some(nearest),
    };
    rewrite(&job, &|_| ()).unwrap();
    assert_eq!(corpus.add_rewrites(&out, &tokenizer, 48).unwrap(), 6);

    let vocabulary = Vocabulary::of(&tokenizer);
    let source = source(&corpus, &vision, &vocabulary);
    let recipe = "steps = 1\nviews = 2\n[batch]\nimages = 6\ncaptions = 1\nmatch_images = 6\nmatch_negatives = 1\n\
                  match_rewrites = 1\nmatch_sentences = 1\nmatch_paraphrases = 1\n";
    let recipe = Recipe::from_toml(recipe).unwrap();
    let batch = StepBatch::build(&model, &recipe, &source, &mut Orders::default(), 0).unwrap();
    let parts = &batch.chunks[0].parts;
    // Of every picture its own caption, a neighbour's, a rewritten one where a word can be replaced, another picture's
    // that is near, a paraphrase.
    let mut rewritten = 0;
    for picture in 0..6 {
        let own = parts.match_labels.iter().zip(&parts.match_image_of).filter(|(_, of)| **of == picture);
        let labels: Vec<f32> = own.map(|(label, _)| *label).collect();
        assert!([vec![1.0, 0.0, 0.0, 0.0, 1.0], vec![1.0, 0.0, 0.0, 1.0]].contains(&labels), "{labels:?}");
        rewritten += labels.len() - 4;
    }
    assert!(rewritten >= 4, "{rewritten}");
    // The near ones are other pictures' captions, one for each of its own.
    for pair in &corpus.pairs {
        for caption in 0..5 {
            let [near] = pair.sentences_for(0, caption) else { panic!("{}: caption {caption}", pair.key) };
            assert!(!pair.captions.contains(near) && corpus.pairs.iter().any(|other| other.captions.contains(near)));
        }
    }
}

#[test]
fn what_is_asked_of_a_hidden_detected_region_is_what_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let (mut corpus, _, tokenizer) = six_scenes(folder.path(), 0);
    let size = "name = 'd'\nhidden = 8\nlayers = 1\nheads = 2\nfeed_forward = 8\nvocabulary = 400\npositions = 64\nembedding = 8\n\
                region_feature = 2\nregion_classes = 3\ndetected_regions = 6\ndropout = 0.0\n";
    let config = ModelConfig { vocabulary: tokenizer.vocabulary_size(), ..ModelConfig::from_toml(size).unwrap() };
    // Six regions side by side, and for the second picture four.
    let line = |name: &str, regions: usize| {
        let boxes: Vec<f32> = (0..regions).flat_map(|r| [r as f32, 0.0, r as f32 + 1.0, 9.0]).collect();
        let features: Vec<f32> = (0..regions).flat_map(|r| [r as f32, 10.0 * r as f32]).collect();
        let probabilities: Vec<f32> = (0..regions).flat_map(|r| [r as f32 / 16.0, 0.25, 0.25]).collect();
        write_line(name, [9, 9], &boxes, &features, &probabilities)
    };
    let table = folder.path().join("t.tsv");
    std::fs::write(&table, format!("{}\n{}\n", line("a", 6), line("b", 4))).unwrap();
    let cache = DetectionCache { folder: folder.path(), shapes: config.region_shapes() };
    corpus.add_detected_images(&[table], &cache, &|_| ()).unwrap();
    let model = Unimo::new(config, 1, &Device::Cpu).unwrap();
    let source = Source {
        corpus: &corpus,
        tfidf: None,
        first_text: &[],
        vision: &Vision::detected(),
        vocabulary: &Vocabulary::of(&tokenizer),
        task: None,
        writing: None,
        critic: None,
    };
    let recipe = Recipe::from_toml("steps = 1\n[batch]\nimages = 0\ncaptions = 0\nimages_alone = 2\n").unwrap();
    let (mut hidden, mut rows) = (0, 0);
    for step in 0..20 {
        let batch = StepBatch::build(&model, &recipe, &source, &mut Orders::default(), step).unwrap();
        let chunk = &batch.chunks[0];
        rows += batch.rows();
        let Some(MaskedRegions { features, labels }) = &chunk.regions else { continue };
        let (features, labels) = (features.to_vec2::<f32>().unwrap(), labels.as_ref().unwrap().to_vec2::<f32>().unwrap());
        for (n, row) in chunk.parts.regions.rows.iter().enumerate() {
            // Two pictures of six and four regions in either order, each behind its [IMG].
            let region = features[n][0];
            assert!([1.0, 6.0, 8.0].map(|first| first + region).contains(&(*row as f32)), "row {row}, region {region}");
            assert_eq!(features[n][1], 10.0 * region);
            let expected = [region / 16.0, 0.25, 0.25].map(|p| p / (region / 16.0 + 0.5));
            // Written as halves, and scaled in f32.
            assert!(labels[n].iter().zip(expected).all(|(label, p)| (label - p).abs() < 1e-3), "{:?}", labels[n]);
            hidden += 1;
        }
    }
    assert_eq!(rows, 20 * 12);
    assert!((40..120).contains(&hidden), "{hidden}");
}
