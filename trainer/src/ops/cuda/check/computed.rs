//! The cross-modal contrast, which only computations know: values and gradients against plain f64, asked for and recorded.

use anyhow::Result;
use candle_core::{Device, Tensor, Var};

use super::{Outcome, error, read, values};
use crate::ops::cuda::computations::{Computations, Found, Given};
use crate::ops::{Computation, Operators, Relations, Scores};

/// Rows and columns of the scores, of four images among seven and six texts among forty.
const SIZES: [(usize, usize); 5] = [(4, 40), (6, 7), (3, 6), (4, 5), (5, 1)];
const FACTOR: f64 = 0.4;

/// The third image has nothing but a false pair, and so no contrast.
fn relations() -> Relations {
    Relations {
        images: 4,
        first_image: 2,
        first_text: 31,
        image_of_text: vec![1, 0, 0, 3, 1, 0],
        retrieved_image_of: vec![3, 0, 3],
        retrieved_text_of: vec![0, 1, 1, 3, 0],
        pairs: vec![(1, true), (2, false), (0, false), (1, false), (3, true)],
    }
}

struct Contrast<'a> {
    log_temperature: &'a Var,
    relations: Relations,
}

impl Computation for Contrast<'_> {
    const NAME: &'static str = "cross_modal";

    fn compute<O: Operators>(&self, on: &O, given: &[O::Array]) -> candle_core::Result<Vec<O::Array>> {
        let [with_texts, with_images, of_images, of_texts, of_pairs] = given else { candle_core::bail!("five kinds of scores") };
        let temperature = on.bounded_exp(self.log_temperature, [0.01, 1.0])?;
        let scores = Scores {
            with_texts,
            with_images: Some(with_images),
            of_retrieved_images: Some(of_images),
            of_retrieved_texts: Some(of_texts),
            of_pairs: Some(of_pairs),
        };
        Ok(vec![on.cross_modal(&scores, &temperature, &self.relations, FACTOR)?])
    }
}

/// The loss, of the scores and the logarithm of the temperature.
fn formula(scores: &[Vec<f64>], log_temperature: f64, of: &Relations) -> f64 {
    let texts = of.image_of_text.len();
    let e = |kind: usize, row: usize, column: usize| (scores[kind][row * SIZES[kind].1 + column] / log_temperature.exp()).exp();
    let mut sum = 0.0;
    for image in 0..of.images {
        let (mut positive, mut all) = (0.0, (0..SIZES[0].1).map(|text| e(0, image, text)).sum::<f64>());
        let own: Vec<usize> = (0..texts).filter(|&text| of.image_of_text[text] == image).collect();
        for &text in &own {
            positive += e(0, image, of.first_text + text);
            all += (0..SIZES[1].1).filter(|&other| other != of.first_image + image).map(|other| e(1, text, other)).sum::<f64>();
        }
        let mut found = 0.0;
        for (row, _) in of.retrieved_image_of.iter().enumerate().filter(|(_, for_image)| **for_image == image) {
            found += own.iter().map(|&text| e(2, row, text)).sum::<f64>();
        }
        for (column, _) in of.retrieved_text_of.iter().enumerate().filter(|(_, for_image)| **for_image == image) {
            found += e(3, image, column);
        }
        positive += found;
        all += found;
        for (logit, (_, fits)) in scores[4].iter().zip(&of.pairs).filter(|(_, (of, _))| *of == image) {
            positive += if *fits { logit.exp() } else { 0.0 };
            all += logit.exp();
        }
        sum -= if positive > 0.0 { (positive / all).ln() } else { 0.0 };
    }
    FACTOR * sum
}

/// Three times the same, of other scores.
///
/// # Errors
/// Those of candle.
pub fn cross_modal(device: &Device) -> Result<Vec<Outcome>> {
    let (computations, mut outcomes) = (Computations::default(), Vec::new());
    let log_temperature = Var::new(-1.2f32, device)?;
    let contrast = Contrast { log_temperature: &log_temperature, relations: relations() };
    for pass in 0..3u32 {
        let kinds: Vec<Vec<f32>> = (0u32..).zip(SIZES).map(|(kind, (m, n))| values(120 + 5 * pass + kind, m * n)).collect();
        let tensors = kinds.iter().zip(SIZES).map(|(kind, size)| Ok([Tensor::from_slice(kind, size, device)?]));
        let tensors = tensors.collect::<candle_core::Result<Vec<_>>>()?;
        let given: Vec<_> = tensors.iter().map(|all| Given::Matrices { all, parts: None, wanted: true }).collect();
        let Found { outputs, by_weights, by_given } = computations.at_once(&contrast, &given, &[1.0], device)?;
        let wide: Vec<Vec<f64>> = kinds.iter().map(|kind| kind.iter().map(|v| f64::from(*v)).collect()).collect();
        let at = f64::from(read(&log_temperature)?[0]);
        let loss = formula(&wide, at, &contrast.relations);
        let how = if computations.counts().replayed == u64::from(pass) {
            ["asked for", "recorded"][usize::from(pass > 0)]
        } else {
            "lost"
        };
        let mut put = |what: &str, got: &[f32], expected: &[f64], tolerance: f64| {
            let error = if how == "lost" { f64::INFINITY } else { error(got, expected) };
            outcomes.push(Outcome { name: format!("cross-modal contrast, {how}, pass {}{what}", pass + 1), error, tolerance });
        };
        put("", &read(&outputs[0])?, &[loss], 1e-5);
        let slope = |at_delta: &dyn Fn(f64) -> f64| (at_delta(1e-5) - at_delta(-1e-5)) / 2e-5;
        let (mut got, mut expected) = (Vec::new(), Vec::new());
        for (kind, by) in by_given.iter().enumerate() {
            let by = by.as_ref().map(read).transpose()?.unwrap_or_default();
            got.extend(by);
            expected.extend((0..wide[kind].len()).map(|place| {
                slope(&|delta| {
                    let mut moved = wide.clone();
                    moved[kind][place] += delta;
                    formula(&moved, at, &contrast.relations)
                })
            }));
        }
        put(", gradient", &got, &expected, 1e-5);
        let by_temperature = by_weights.iter().map(|(_, by)| read(by)).collect::<Result<Vec<_>>>()?.concat();
        put(
            ", gradient by the temperature",
            &by_temperature,
            &[slope(&|delta| formula(&wide, at + delta, &contrast.relations))],
            1e-5,
        );
    }
    Ok(outcomes)
}
