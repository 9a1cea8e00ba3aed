//! What is hidden from the model: spans of text, fragments of text that it is to write, blocks of neighbouring regions.

use std::ops::Range;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use unimo::tokenizer::{CLS, SEP, Tokenizer, UNK};

/// Success rate of the geometric span lengths, and their maximum, in words (SpanBERT; arXiv 2012.15409, section 2.3).
const SPAN: (f64, usize) = (0.2, 10);
/// Share of a text that is masked.
const MASKED_TEXT: f64 = 0.15;
/// Share of a text that is taken out as fragments (arXiv 2012.15409, section 2.3), and the longest fragment in words (the paper
/// says only that lengths are uniform).
const FRAGMENTS: (f64, usize) = (0.25, 8);

/// What masking has to know of a vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary {
    /// `[MASK]`.
    pub mask_token: u32,
    begins_word: Vec<bool>,
}

impl Vocabulary {
    /// That of a tokenizer.
    #[must_use]
    pub fn of(tokenizer: &Tokenizer) -> Self {
        let ids = 0..tokenizer.vocabulary_size() as u32;
        Self { mask_token: tokenizer.mask(), begins_word: ids.map(|id| tokenizer.begins_word(id)).collect() }
    }

    /// Ranges of the words of `[CLS] … [SEP]`; a token that continues a word belongs to it.
    fn words(&self, ids: &[u32]) -> Vec<Range<usize>> {
        let mut words: Vec<Range<usize>> = Vec::new();
        let begins = |id: u32| self.begins_word.get(id as usize).is_some_and(|&begins| begins);
        let inner = ids.iter().enumerate().take(ids.len().saturating_sub(1)).skip(1);
        for (at, &id) in inner {
            match words.last_mut() {
                Some(word) if !begins(id) => word.end = at + 1,
                _ => words.push(at..at + 1),
            }
        }
        words
    }
}

/// A text with hidden tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaskedText {
    /// Ids with masks in place.
    pub ids: Vec<u32>,
    /// `(position, id that was there)`.
    pub targets: Vec<(usize, u32)>,
}

/// Hides spans of whole words of `ids` (`[CLS] … [SEP]`, whose ends stay) until 15 % of the tokens are hidden, at least one word.
/// A span becomes `[MASK]` in 80 % of cases, random tokens in 10 %, and stays in 10 %.
#[must_use]
pub fn mask_text(ids: &[u32], vocabulary: &Vocabulary, rng: &mut ChaCha8Rng) -> MaskedText {
    let mut masked = MaskedText { ids: ids.to_vec(), targets: Vec::new() };
    let geometric = |rng: &mut ChaCha8Rng| {
        let mut length = 1;
        while length < SPAN.1 && !rng.random_bool(SPAN.0) {
            length += 1;
        }
        length
    };
    for span in spans(&vocabulary.words(ids), MASKED_TEXT, geometric, rng) {
        let kind: f64 = rng.random();
        for position in span {
            masked.targets.push((position, ids[position]));
            if kind < 0.8 {
                masked.ids[position] = vocabulary.mask_token;
            } else if kind < 0.9 {
                masked.ids[position] = rng.random_range(UNK + 1..vocabulary.mask_token);
            }
        }
    }
    masked
}

/// A text with fragments taken out, and the fragments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fragments {
    /// `[CLS] what is left [SEP]`; the gaps are closed.
    pub source: Vec<u32>,
    /// `[CLS] fragment [SEP] fragment [SEP] …`, in the order of the text.
    pub target: Vec<u32>,
}

/// Takes fragments of whole words, of uniform lengths, out of `ids` (`[CLS] … [SEP]`) until a quarter of the tokens is taken, at
/// least one word. Neighbouring fragments are one.
#[must_use]
pub fn take_fragments(ids: &[u32], vocabulary: &Vocabulary, rng: &mut ChaCha8Rng) -> Fragments {
    let uniform = |rng: &mut ChaCha8Rng| rng.random_range(1..=FRAGMENTS.1);
    let taken = spans(&vocabulary.words(ids), FRAGMENTS.0, uniform, rng);
    let mut fragments = Fragments { source: Vec::new(), target: vec![CLS] };
    let mut at = 0;
    for span in &taken {
        fragments.source.extend(&ids[at..span.start]);
        if at == span.start && fragments.target.len() > 1 {
            fragments.target.pop();
        }
        fragments.target.extend(&ids[span.clone()]);
        fragments.target.push(SEP);
        at = span.end;
    }
    fragments.source.extend(&ids[at..]);
    fragments
}

/// Draws spans of whole words, disjoint and in order, until `share` of the tokens is in one; the last is cut to what is left, but
/// not below a word.
fn spans(
    words: &[Range<usize>],
    share: f64,
    length: impl Fn(&mut ChaCha8Rng) -> usize,
    rng: &mut ChaCha8Rng,
) -> Vec<Range<usize>> {
    let (Some(first), Some(last)) = (words.first(), words.last()) else { return Vec::new() };
    let budget = (((last.end - first.start) as f64 * share).round() as usize).max(1);
    let (mut count, mut hidden) = (0, vec![false; words.len()]);
    let mut spans = Vec::new();
    while count < budget {
        let longest = length(rng);
        let start = rng.random_range(0..words.len());
        let mut end = start;
        while end < words.len() && end - start < longest && !hidden[end] && (end == start || count + words[end].len() <= budget) {
            hidden[end] = true;
            count += words[end].len();
            end += 1;
        }
        if end > start {
            spans.push(words[start].start..words[end - 1].end);
        }
    }
    spans.sort_unstable_by_key(|span| span.start);
    spans
}

/// Hides blocks of neighbouring cells (2×2, or what of it lies inside) until `share` of the grid is hidden. Returns sorted
/// cell numbers.
#[must_use]
pub fn mask_regions(grid: usize, share: f64, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let budget = ((grid * grid) as f64 * share).round().max(1.0) as usize;
    let mut hidden = vec![false; grid * grid];
    let mut count = 0;
    while count < budget {
        let (row, column) = (rng.random_range(0..grid), rng.random_range(0..grid));
        for (r, c) in [(row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)] {
            if r < grid && c < grid && !hidden[r * grid + c] && count < budget {
                hidden[r * grid + c] = true;
                count += 1;
            }
        }
    }
    (0..hidden.len()).filter(|&i| hidden[i]).collect()
}

/// Overlap (IoU) from which a region is hidden with the masked one that it overlaps.
const OVERLAP: f32 = 0.3;

/// Area of what two boxes share, divided by that of what they cover together; boxes are x1, y1, x2, y2.
fn overlap(a: &[f32], b: &[f32]) -> f32 {
    let side = |low: usize, high: usize| (a[high].min(b[high]) - a[low].max(b[low])).max(0.0);
    let area = |c: &[f32]| (c[2] - c[0]) * (c[3] - c[1]);
    let shared = side(0, 2) * side(1, 3);
    let covered = area(a) + area(b) - shared;
    if covered > 0.0 { shared / covered } else { 0.0 }
}

/// Draws each detected region with probability `share`, at least one, and hides it with every region that overlaps it by an IoU
/// above 0.3 (arXiv 2012.15409, section 2.3). `boxes` is `[regions, 5]`. Returns sorted numbers.
#[must_use]
pub fn mask_detected(boxes: &[f32], share: f64, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let boxes: Vec<&[f32]> = boxes.chunks_exact(5).collect();
    let mut drawn: Vec<usize> = (0..boxes.len()).filter(|_| rng.random_bool(share)).collect();
    if drawn.is_empty() && !boxes.is_empty() {
        drawn.push(rng.random_range(0..boxes.len()));
    }
    let hidden = |region: &usize| drawn.iter().any(|d| d == region || overlap(boxes[*d], boxes[*region]) > OVERLAP);
    (0..boxes.len()).filter(hidden).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 501 tokens, `[MASK]` last; odd ones continue a word where `long_words`.
    fn vocabulary(long_words: bool) -> Vocabulary {
        Vocabulary { mask_token: 500, begins_word: (0..501).map(|id| !long_words || id % 2 == 0).collect() }
    }

    #[test]
    fn text_masking_hides_the_asked_share_and_keeps_the_ends() {
        let mut rng = crate::seed::rng(3);
        let ids: Vec<u32> = std::iter::once(0).chain(10..110).chain([2]).collect();
        let (mut masked, mut random, mut kept) = (0, 0, 0);
        for _ in 0..400 {
            let m = mask_text(&ids, &vocabulary(false), &mut rng);
            assert_eq!(m.targets.len(), 15);
            assert_eq!((m.ids[0], m.ids[101]), (0, 2));
            for &(position, target) in &m.targets {
                assert_eq!(ids[position], target);
                match m.ids[position] {
                    500 => masked += 1,
                    id if id == target => kept += 1,
                    _ => random += 1,
                }
            }
            let changed = m.ids.iter().zip(&ids).filter(|(a, b)| a != b).count();
            assert!(changed <= 15);
        }
        let share = |n: i32| f64::from(n) / 6000.0;
        assert!((share(masked) - 0.8).abs() < 0.05 && (share(random) - 0.1).abs() < 0.04 && (share(kept) - 0.1).abs() < 0.04);
        assert_eq!(mask_text(&[0, 2], &vocabulary(false), &mut rng).targets, []);
    }

    #[test]
    fn words_are_masked_whole_and_in_spans() {
        let mut rng = crate::seed::rng(5);
        let ids: Vec<u32> = std::iter::once(0).chain(10..110).chain([2]).collect();
        let (mut runs, mut hidden) = (0, 0);
        for _ in 0..200 {
            let positions: Vec<usize> = mask_text(&ids, &vocabulary(true), &mut rng).targets.iter().map(|t| t.0).collect();
            // Two tokens a word: 15 are reached by the eighth word.
            assert_eq!(positions.len(), 16);
            for pair in positions.chunks(2) {
                assert_eq!((pair[0] % 2, pair[1]), (1, pair[0] + 1), "half a word is masked");
            }
            runs += 1 + positions.windows(2).filter(|w| w[1] != w[0] + 1).count();
            hidden += positions.len() / 2;
        }
        // Geometric lengths of mean 1/0.2, cut at 10 words and by what is left of 8.
        let mean = hidden as f64 / runs as f64;
        assert!((2.0..6.0).contains(&mean), "spans of {mean} words on average");
    }

    #[test]
    fn fragments_and_what_is_left_are_the_whole_text() {
        let mut rng = crate::seed::rng(6);
        let ids: Vec<u32> = std::iter::once(CLS).chain(10..110).chain([SEP]).collect();
        let mut counts = [0usize; 2];
        for _ in 0..200 {
            let Fragments { source, target } = take_fragments(&ids, &vocabulary(true), &mut rng);
            assert_eq!((source[0], source.last(), target[0], target.last()), (CLS, Some(&SEP), CLS, Some(&SEP)));
            let taken: Vec<u32> = target.iter().copied().filter(|id| *id >= 10).collect();
            assert!((25..=26).contains(&taken.len()), "{} tokens taken", taken.len());
            let mut all: Vec<u32> = source.iter().chain(&taken).copied().filter(|id| *id >= 10).collect();
            all.sort_unstable();
            assert_eq!(all, (10..110).collect::<Vec<u32>>());
            for fragment in target[1..].split(|&id| id == SEP).filter(|f| !f.is_empty()) {
                assert!(fragment.windows(2).all(|w| w[1] == w[0] + 1) && fragment[0] % 2 == 0, "{fragment:?} is no run of words");
                counts[0] += 1;
                counts[1] += fragment.len() / 2;
            }
        }
        let mean = counts[1] as f64 / counts[0] as f64;
        assert!((2.0..6.0).contains(&mean), "fragments of {mean} words on average");
        let nothing = Fragments { source: vec![CLS, SEP], target: vec![CLS] };
        assert_eq!(take_fragments(&[CLS, SEP], &vocabulary(true), &mut rng), nothing);
    }

    #[test]
    fn region_masking_hides_the_asked_share_in_blocks() {
        let mut rng = crate::seed::rng(4);
        let mut alone = 0;
        for _ in 0..200 {
            let cells = mask_regions(7, 0.15, &mut rng);
            assert_eq!(cells.len(), 7);
            let near = |a: usize, b: usize| (a / 7).abs_diff(b / 7) + (a % 7).abs_diff(b % 7) == 1;
            alone += cells.iter().filter(|&&a| !cells.iter().any(|&b| near(a, b))).count();
        }
        assert!(alone < 200, "{alone} of 1400 cells without a masked neighbour");
    }

    /// Against a count of the points of a fine lattice that lie in one box, and in both.
    #[test]
    fn overlaps_are_those_of_a_direct_count() {
        let boxes: [[f32; 4]; 7] = [
            [0.0, 0.0, 0.5, 0.5],
            [0.25, 0.25, 0.75, 0.75],
            [0.1, 0.0, 0.6, 0.5],
            [0.5, 0.0, 1.0, 0.5],
            [0.0, 0.0, 1.0, 1.0],
            [0.3, 0.3, 0.3, 0.9],
            [0.2, 0.1, 0.4, 0.95],
        ];
        const POINTS: usize = 400;
        let inside = |b: &[f32; 4], x: f32, y: f32| b[0] <= x && x < b[2] && b[1] <= y && y < b[3];
        for a in &boxes {
            for b in &boxes {
                let (mut both, mut any) = (0, 0);
                for point in 0..POINTS * POINTS {
                    let at = |i: usize| (i as f32 + 0.5) / POINTS as f32;
                    let (x, y) = (at(point % POINTS), at(point / POINTS));
                    let (in_a, in_b) = (inside(a, x, y), inside(b, x, y));
                    both += usize::from(in_a && in_b);
                    any += usize::from(in_a || in_b);
                }
                let expected = if any == 0 { 0.0 } else { both as f32 / any as f32 };
                assert!((overlap(a, b) - expected).abs() < 0.01, "{a:?} {b:?}: {} {expected}", overlap(a, b));
            }
        }
    }

    #[test]
    fn detected_regions_are_hidden_with_those_that_overlap_them() {
        let mut rng = crate::seed::rng(8);
        let (mut drawn_alone, mut hidden, mut total) = (0, 0, 0usize);
        for round in 0..300 {
            // Ten boxes, some of which overlap, and one far from all.
            let mut boxes: Vec<[f32; 5]> = (0..10)
                .map(|_| {
                    let (x, y): (f32, f32) = (rng.random_range(0.0..0.5), rng.random_range(0.0..0.5));
                    let (w, h): (f32, f32) = (rng.random_range(0.1..0.3), rng.random_range(0.1..0.3));
                    [x, y, x + w, y + h, w * h]
                })
                .collect();
            boxes.push([0.9, 0.9, 1.0, 1.0, 0.01]);
            let flat: Vec<f32> = boxes.iter().flatten().copied().collect();
            let masked = mask_detected(&flat, 0.15, &mut crate::seed::rng(round));
            // The same draws, and the definition word for word.
            let mut same = crate::seed::rng(round);
            let mut drawn: Vec<usize> = (0..11).filter(|_| same.random_bool(0.15)).collect();
            if drawn.is_empty() {
                drawn.push(same.random_range(0..11));
            }
            let mut expected = drawn.clone();
            for (region, a) in boxes.iter().enumerate() {
                for &d in &drawn {
                    let b = &boxes[d];
                    let w = f64::from(a[2].min(b[2])) - f64::from(a[0].max(b[0]));
                    let h = f64::from(a[3].min(b[3])) - f64::from(a[1].max(b[1]));
                    let shared = if w > 0.0 && h > 0.0 { w * h } else { 0.0 };
                    if shared / (f64::from(a[4]) + f64::from(b[4]) - shared) > 0.3 {
                        expected.push(region);
                    }
                }
            }
            expected.sort_unstable();
            expected.dedup();
            assert_eq!(masked, expected);
            drawn_alone += i32::from(masked.contains(&10));
            hidden += masked.len();
            total += 11;
        }
        // The one far from all is hidden as often as it is drawn: 0.15, and a share of the rounds in which none was.
        let (alone, all) = (f64::from(drawn_alone) / 300.0, hidden as f64 / total as f64);
        assert!((0.10..0.23).contains(&alone), "{alone}");
        assert!(all > alone + 0.05, "{all} {alone}: overlapping regions are not hidden more often");
        assert_eq!(mask_detected(&[0.0, 0.0, 1.0, 1.0, 1.0], 0.0, &mut rng), [0]);
        assert_eq!(mask_detected(&[], 0.15, &mut rng), [0usize; 0]);
    }
}
