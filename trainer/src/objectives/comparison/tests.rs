//! Both contrasts among one and several ranks, against their formulas and finite differences of these, in f64.

use super::*;
use crate::model::gradients_of;
use crate::ops::cuda::emulation::emulated;
use crate::ops::cuda::layers::Counts;
use crate::ops::cuda::works_on;
use crate::parallel::Connected;
use crate::parallel::testing::{among, between_devices};

const WIDTH: usize = 4;

/// What one rank brings, its pictures numbered from 0.
#[derive(Clone, Default)]
struct Rank {
    images: usize,
    image_of_text: Vec<usize>,
    retrieved_image_of: Vec<usize>,
    retrieved_text_of: Vec<usize>,
    joint: Vec<(usize, f32)>,
    further: usize,
}

/// Values of a kind: embeddings, or scores where they are one wide.
fn values(rank: usize, kind: usize, count: usize) -> Vec<f64> {
    (0..count).map(|i| f64::from(((rank * 131 + kind * 17 + i * 7) as f32 * 0.83).sin() * 0.6)).collect()
}

impl Rank {
    /// With its pictures numbered from `first`.
    fn members(&self, first: usize) -> Members {
        let global = |of: &[usize]| of.iter().map(|image| image + first).collect();
        Members {
            images: first..first + self.images,
            image_of_text: global(&self.image_of_text),
            retrieved_image_of: global(&self.retrieved_image_of),
            retrieved_text_of: global(&self.retrieved_text_of),
            joint_image_of: self.joint.iter().map(|(image, _)| image + first).collect(),
            joint_labels: self.joint.iter().map(|(_, label)| *label).collect(),
            further: self.further,
        }
    }
}

/// Both losses straight from their formulas, over what all ranks bring; `of[rank][kind]` are the values.
fn formula(ranks: &[Rank], of: &[[Vec<f64>; KINDS]], temperature: f64) -> [f64; 2] {
    type Rows = Vec<(usize, Vec<f64>)>;
    let (mut first, mut images, mut texts, mut found_images, mut found_texts) =
        (0, Vec::new(), Rows::new(), Rows::new(), Rows::new());
    let (mut joint, mut further) = (Vec::new(), Vec::new());
    for (rank, values) in ranks.iter().zip(of) {
        let row = |kind: usize, i: usize| values[kind][i * WIDTH..(i + 1) * WIDTH].to_vec();
        images.extend((0..rank.images).map(|i| row(0, i)));
        let rows = |kind: usize, of: &[usize]| -> Rows {
            of.iter().enumerate().map(|(i, image)| (image + first, row(kind, i))).collect()
        };
        texts.extend(rows(1, &rank.image_of_text));
        found_images.extend(rows(2, &rank.retrieved_image_of));
        found_texts.extend(rows(3, &rank.retrieved_text_of));
        joint.extend(rank.joint.iter().zip(&values[4]).map(|(&(image, label), &score)| (image + first, label, score.exp())));
        further.extend((0..rank.further).map(|i| (row(FURTHER_IMAGES, i), row(FURTHER_TEXTS, i))));
        first += rank.images;
    }
    let e = |a: &[f64], b: &[f64]| (a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / temperature).exp();
    let (mut by_image, mut by_text, mut cross) = (Vec::new(), Vec::new(), Vec::new());
    let with_further_texts = |image: &[f64]| further.iter().map(|(_, text)| e(image, text)).sum::<f64>();
    let with_further_images = |text: &[f64]| further.iter().map(|(image, _)| e(image, text)).sum::<f64>();
    for (i, image) in images.iter().enumerate() {
        let own: f64 = texts.iter().filter(|t| t.0 == i).map(|t| e(image, &t.1)).sum();
        let all: f64 = texts.iter().map(|t| e(image, &t.1)).sum();
        if own > 0.0 {
            by_image.push(-(own / (all + with_further_texts(image)) + 1e-12).ln());
        }
        let (mut positive, mut negative) = (own, all - own);
        for text in texts.iter().filter(|t| t.0 == i) {
            positive += found_images.iter().filter(|f| f.0 == i).map(|f| e(&f.1, &text.1)).sum::<f64>();
            negative += images.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, other)| e(other, &text.1)).sum::<f64>();
        }
        positive += found_texts.iter().filter(|f| f.0 == i).map(|f| e(image, &f.1)).sum::<f64>();
        positive += joint.iter().filter(|j| j.0 == i && j.1 > 0.5).map(|j| j.2).sum::<f64>();
        negative += joint.iter().filter(|j| j.0 == i && j.1 < 0.5).map(|j| j.2).sum::<f64>();
        if positive > 0.0 {
            cross.push(-(positive / (positive + negative)).ln());
        }
    }
    for (own, text) in &texts {
        let all: f64 = images.iter().map(|image| e(image, text)).sum();
        by_text.push(-(e(&images[*own], text) / (all + with_further_images(text))).ln());
    }
    for (image, text) in &further {
        let own = e(image, text);
        let all: f64 = texts.iter().map(|(_, text)| e(image, text)).sum();
        by_image.push(-(own / (all + with_further_texts(image)) + 1e-12).ln());
        let all: f64 = images.iter().map(|image| e(image, text)).sum();
        by_text.push(-(own / (all + with_further_images(text))).ln());
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    [0.5 * (mean(&by_image) + mean(&by_text)), mean(&cross)]
}

/// What one rank finds: losses by name, gradients by what it has encoded, and by the temperature.
type Found = (Vec<(&'static str, f64)>, [Option<Tensor>; KINDS], f64);

fn compared(ranks: &dyn Collective, encoded: Encoded, members: &Members, weights: &LossWeights, temperature: f64) -> Found {
    let comparison = Comparison::among(ranks, encoded, members, WIDTH, &Device::Cpu).unwrap();
    let log_temperature = Var::new(temperature.ln() as f32, &Device::Cpu).unwrap();
    let computing = Computing::default();
    let mut terms = comparison.terms(weights, &computing, log_temperature.as_tensor()).unwrap();
    let losses: Vec<_> = terms.iter().map(Term::alone).collect();
    if works_on(&Device::Cpu) {
        // What is recorded gives bit by bit what was asked for.
        for _ in 0..2 {
            terms = comparison.terms(weights, &computing, log_temperature.as_tensor()).unwrap();
            assert_eq!(terms.iter().map(Term::alone).collect::<Vec<_>>(), losses);
        }
        let (kinds, Counts { passes, replayed, recordings }) = (losses.len() as u64, computing.counts());
        assert_eq!((passes, replayed, recordings), (3 * kinds, 2 * kinds, kinds));
    }
    let backs = terms.into_iter().map(|term| term.back).collect();
    let leaves = comparison.leaves().chain([&log_temperature]);
    let (mut all, _) = gradients_of(backs, leaves).unwrap();
    let by_log = all.remove(&log_temperature).map_or(0.0, |gradient| f64::from(gradient.to_scalar::<f32>().unwrap()));
    (losses, comparison.own_gradients(ranks, &mut all).unwrap(), by_log / temperature)
}

fn check(plan: &[Rank], temperature: f64) {
    let weights = LossWeights { contrast: 1.5, cross_modal: 0.7, ..LossWeights::default() };
    let width = |kind: usize| if kind == 4 { 1 } else { WIDTH };
    let of: Vec<[Vec<f64>; KINDS]> = plan
        .iter()
        .enumerate()
        .map(|(number, rank)| {
            let counts = rank.members(0).counts();
            std::array::from_fn(|kind| values(number, kind, counts[kind] * width(kind)))
        })
        .collect();
    let work = |ranks: &dyn Collective| {
        let (number, first) = (ranks.rank(), plan[..ranks.rank()].iter().map(|rank| rank.images).sum::<usize>());
        let tensor = |kind: usize| {
            let values: Vec<f32> = of[number][kind].iter().map(|&v| v as f32).collect();
            let count = values.len();
            let tensor = Tensor::from_vec(values, count, &Device::Cpu).unwrap();
            let shaped = if kind == 4 { tensor } else { tensor.reshape((count / WIDTH, WIDTH)).unwrap() };
            (count > 0).then_some(shaped)
        };
        let encoded = Encoded { tensors: std::array::from_fn(tensor), pending: None };
        compared(ranks, encoded, &plan[number].members(first), &weights, temperature)
    };
    let through_hosts = among(plan.len(), work);
    let through_devices = among(plan.len(), |ranks| work(&Connected::by(ranks, between_devices(ranks))));
    let on_kernels = among(plan.len(), |ranks| emulated(2, || work(ranks)));
    check_against_the_formula(plan, &of, temperature, &weights, &on_kernels);
    check_against_the_formula(plan, &of, temperature, &weights, &through_hosts);
    check_against_the_formula(plan, &of, temperature, &weights, &through_devices);
}

fn check_against_the_formula(plan: &[Rank], of: &[[Vec<f64>; KINDS]], temperature: f64, weights: &LossWeights, got: &[Found]) {
    for (name, expected) in [CONTRAST, CROSS_MODAL].into_iter().zip(formula(plan, of, temperature)) {
        let sum: f64 = got.iter().flat_map(|(losses, ..)| losses).filter(|loss| loss.0 == name).map(|loss| loss.1).sum();
        assert!((sum - expected).abs() < 2e-6 * (1.0 + expected), "{name}: {sum} {expected}");
    }
    let total = |of: &[[Vec<f64>; KINDS]], temperature: f64| {
        let [contrast, cross] = formula(plan, of, temperature);
        weights.contrast * contrast + weights.cross_modal * cross
    };
    // f32 sums of scores up to 1/temperature, whose exponentials lose as much; central differences in f64 lose 1e-9.
    let near = |got: f64, slope: f64| (got - slope).abs() < 2e-5 * (1.0 + slope.abs());
    for (number, (_, gradients, _)) in got.iter().enumerate() {
        for kind in 0..KINDS {
            let gradient = gradients[kind].as_ref().map(|g| g.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            let gradient = gradient.unwrap_or_default();
            assert_eq!(gradient.len(), of[number][kind].len());
            for (i, &got) in gradient.iter().enumerate() {
                let at = |delta: f64| {
                    let mut moved = of.to_vec();
                    moved[number][kind][i] += delta;
                    total(&moved, temperature)
                };
                let slope = (at(1e-6) - at(-1e-6)) / 2e-6;
                assert!(near(f64::from(got), slope), "rank {number}, kind {kind}, {i}: {got} against {slope}");
            }
        }
    }
    let slope = (total(of, temperature + 1e-6) - total(of, temperature - 1e-6)) / 2e-6;
    let got: f64 = got.iter().map(|(_, _, by_temperature)| by_temperature).sum();
    assert!(near(got, slope), "temperature: {got} against {slope}");
}

#[test]
fn losses_and_gradients_over_ranks_are_those_of_the_formulas() {
    let two = Rank {
        images: 2,
        image_of_text: vec![0, 0, 1],
        retrieved_image_of: vec![1, 0],
        retrieved_text_of: vec![0, 0],
        joint: vec![(0, 1.0), (0, 0.0), (1, 0.0)],
        further: 0,
    };
    let three = Rank { images: 3, image_of_text: vec![0, 1, 1, 2], joint: vec![(2, 1.0)], ..Rank::default() };
    let single = Rank { images: 1, image_of_text: vec![0], retrieved_text_of: vec![0], ..Rank::default() };
    // A picture that nothing is said of, and a rank without pictures.
    let undescribed = Rank { images: 2, image_of_text: vec![1], ..Rank::default() };
    for temperature in [0.45, 0.3, 0.1] {
        check(&[two.clone(), three.clone()], temperature);
        check(&[single.clone(), two.clone(), three.clone()], temperature);
        check(&[undescribed.clone(), Rank::default(), single.clone()], temperature);
        check(std::slice::from_ref(&two), temperature);
        // Further pairs, also of a rank that has nothing else.
        let further = Rank { further: 2, ..two.clone() };
        check(&[further.clone(), three.clone(), Rank { further: 1, ..Rank::default() }], temperature);
        check(&[further], temperature);
    }
}

#[test]
fn captions_of_another_ranks_pictures_are_refused() {
    let told = among(2, |ranks| {
        let tensor = || Some(Tensor::ones((1, WIDTH), DType::F32, &Device::Cpu).unwrap());
        let encoded = Encoded { tensors: [tensor(), tensor(), None, None, None, None, None], pending: None };
        let members = Rank { images: 1, image_of_text: vec![0], ..Rank::default() }.members(ranks.rank());
        let members = Members { image_of_text: vec![0], ..members };
        Comparison::among(ranks, encoded, &members, WIDTH, &Device::Cpu).err().unwrap().to_string()
    });
    assert_eq!(told, ["rank 1 brought captions of pictures that are not its own"; 2]);
}
