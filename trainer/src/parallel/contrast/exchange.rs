//! What ranks tell each other of a step's contrasts: their embeddings, and then the sums that gradients are made of.

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};

use super::Own;
use crate::parallel::Collective;

/// One rank's embeddings; none where it has no pictures.
pub(super) struct Block {
    /// Number of its first picture.
    pub(super) first: usize,
    pub(super) images: Option<Tensor>,
    pub(super) texts: Option<Tensor>,
    pub(super) image_of_text: Vec<usize>,
}

impl Block {
    pub(super) fn image_count(&self) -> usize {
        self.images.as_ref().map_or(0, |images| images.dims()[0])
    }
}

/// Logarithms of sums of exponentials of one rank's pictures and texts, which all ranks need for their gradients.
#[derive(Debug, Clone, Default)]
pub(super) struct Sums {
    /// Of each picture with all texts.
    pub(super) image: Vec<f64>,
    /// The first contrast's gradient is so much of that of `image` less the picture's positives.
    pub(super) weight: Vec<f64>,
    /// Of everything in each picture's cross-modal contrast; ∞ where there is none.
    pub(super) cross: Vec<f64>,
    /// Of each text with all pictures.
    pub(super) text: Vec<f64>,
}

/// All ranks' embeddings of pictures and captions.
pub(super) fn gather(ranks: &dyn Collective, own: &Own, width: usize, device: &Device) -> Result<Vec<Block>> {
    let mut bytes = Vec::new();
    for tensor in &own.encoded[..2] {
        let values = tensor.as_ref().map(|t| t.flatten_all()?.to_vec1::<f32>()).transpose()?.unwrap_or_default();
        bytes.extend(((values.len() / width) as u64).to_le_bytes());
        values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
    }
    own.image_of_text.iter().for_each(|&image| bytes.extend((image as u64).to_le_bytes()));
    let mut blocks: Vec<Block> = Vec::new();
    for (rank, bytes) in ranks.all_gather(&bytes)?.iter().enumerate() {
        let mut rest = bytes.as_slice();
        let mut take = |count: usize| -> Result<&[u8]> {
            let (taken, after) = rest.split_at_checked(count).with_context(|| format!("rank {rank} brought too little"))?;
            rest = after;
            Ok(taken)
        };
        let mut embeddings = || -> Result<Option<Tensor>> {
            let count = u64::from_le_bytes(take(8)?.try_into()?) as usize;
            let values = take(count * width * 4)?.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            Ok(if count == 0 { None } else { Some(Tensor::from_vec(values.collect(), (count, width), device)?) })
        };
        let (images, texts) = (embeddings()?, embeddings()?);
        let image_of_text =
            rest.chunks_exact(8).map(|b| Ok(u64::from_le_bytes(b.try_into()?) as usize)).collect::<Result<_>>()?;
        let first = blocks.last().map_or(0, |before| before.first + before.image_count());
        let block = Block { first, images, texts, image_of_text };
        let own = first..first + block.image_count();
        let texts = block.texts.as_ref().map_or(0, |texts| texts.dims()[0]);
        ensure!(
            block.image_of_text.len() == texts && block.image_of_text.iter().all(|image| own.contains(image)),
            "rank {rank} brought captions of pictures that are not its own"
        );
        blocks.push(block);
    }
    Ok(blocks)
}

/// All ranks' sums.
pub(super) fn exchange(ranks: &dyn Collective, own: &Sums) -> Result<Vec<Sums>> {
    let mut bytes = (own.image.len() as u64).to_le_bytes().to_vec();
    for column in [&own.image, &own.weight, &own.cross, &own.text] {
        column.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
    }
    let read = |(rank, bytes): (usize, &Vec<u8>)| -> Result<Sums> {
        let (count, values) = bytes.split_at_checked(8).with_context(|| format!("rank {rank} brought too little"))?;
        let count = u64::from_le_bytes(count.try_into()?) as usize;
        let values: Vec<f64> = values.chunks_exact(8).map(|b| Ok(f64::from_le_bytes(b.try_into()?))).collect::<Result<_>>()?;
        ensure!(values.len() >= 3 * count, "rank {rank} brought too little");
        let column = |i: usize| values[i * count..(i + 1) * count].to_vec();
        Ok(Sums { image: column(0), weight: column(1), cross: column(2), text: values[3 * count..].to_vec() })
    };
    ranks.all_gather(&bytes)?.iter().enumerate().map(read).collect()
}
