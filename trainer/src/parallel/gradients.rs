//! Sums of gradients over the ranks.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::{Collective, DeviceSums};

/// Values that are summed at once: 4 MiB, so that what an exchange holds beside the gradients is small.
const BUCKET: usize = 1 << 20;

/// Values of a bucket in device memory, 32 MiB, that is written at once.
const DEVICE_BUCKET: usize = 1 << 23;

/// Replaces the gradients by their sums over all ranks. A variable that no rank has a gradient of keeps none.
///
/// Where the ranks have a way between their devices, the sums do not leave these; they are made in an order of its library's then, the
/// same in every run of as many ranks on as many hosts.
///
/// candle gives the gradients of a backward pass all at once, when it is through: there is nothing left to overlap the exchange
/// with, and buckets bound its memory only.
///
/// # Errors
/// Those of candle; a rank that is gone.
pub fn all_reduce<'a>(
    ranks: &dyn Collective,
    variables: impl IntoIterator<Item = &'a Var>,
    gradients: &mut GradStore,
) -> Result<()> {
    let mut variables: Vec<&Var> = variables.into_iter().collect();
    let mut having: Vec<f32> = variables.iter().map(|var| f32::from(u8::from(gradients.get(var).is_some()))).collect();
    ranks.all_reduce(&mut having)?;
    let mut having = having.into_iter();
    variables.retain(|_| having.next().is_some_and(|ranks| ranks > 0.0));
    if let Some(devices) = ranks.devices() {
        return sum_on_devices(devices, &variables, gradients);
    }

    let (mut of_bucket, mut bucket) = (Vec::new(), Vec::new());
    for (i, var) in variables.iter().enumerate() {
        match gradients.remove(var) {
            Some(gradient) => bucket.extend(gradient.flatten_all()?.to_vec1::<f32>()?),
            None => bucket.resize(bucket.len() + var.elem_count(), 0.0),
        }
        of_bucket.push(*var);
        if bucket.len() < BUCKET && i + 1 < variables.len() {
            continue;
        }
        for part in bucket.chunks_mut(BUCKET) {
            ranks.all_reduce(part)?;
        }
        let mut rest = bucket.as_slice();
        for var in of_bucket.drain(..) {
            let (own, after) = rest.split_at(var.elem_count());
            gradients.insert(var, Tensor::from_slice(own, var.shape(), var.device())?);
            rest = after;
        }
        bucket.clear();
    }
    Ok(())
}

/// As [`all_reduce`], of the variables that some rank has a gradient of.
fn sum_on_devices(devices: &dyn DeviceSums, variables: &[&Var], gradients: &mut GradStore) -> Result<()> {
    let (mut buckets, mut size) = (Vec::<(Tensor, Vec<&Var>)>::new(), 0);
    let (mut parts, mut of_bucket) = (Vec::new(), Vec::new());
    for (i, &var) in variables.iter().enumerate() {
        let count = var.elem_count();
        parts.push(match gradients.remove(var) {
            Some(gradient) => gradient.flatten_all()?,
            None => Tensor::zeros(count, var.dtype(), var.device())?,
        });
        of_bucket.push(var);
        size += count;
        if size >= DEVICE_BUCKET || i + 1 == variables.len() {
            // Sums are made in place: in memory of their own.
            let bucket = Tensor::zeros(size, var.dtype(), var.device())?;
            let mut at = 0;
            for part in parts.drain(..) {
                bucket.slice_set(&part.contiguous()?, 0, at)?;
                at += part.elem_count();
            }
            buckets.push((bucket, std::mem::take(&mut of_bucket)));
            size = 0;
        }
    }
    devices.sum(&buckets.iter().map(|(bucket, _)| bucket.clone()).collect::<Vec<_>>())?;
    for (bucket, variables) in buckets {
        let mut at = 0;
        for var in variables {
            gradients.insert(var, bucket.narrow(0, at, var.elem_count())?.reshape(var.shape())?);
            at += var.elem_count();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::Connected;
    use super::super::nccl::Communicator;
    use super::super::nccl::testing::{OnHost, stand_in};
    use super::super::testing::among;
    use super::*;

    #[test]
    fn every_rank_has_the_sums_also_of_what_it_had_no_gradient_of() {
        the_sums_are_right(&|_| None);
    }

    #[test]
    fn sums_between_devices_are_those_of_the_hosts() {
        the_sums_are_right(&|ranks| Some(Box::new(OnHost(Communicator::join(stand_in(), ranks).unwrap()))));
    }

    /// Gives a rank its way between devices.
    type Connect = dyn Fn(&dyn Collective) -> Option<Box<dyn DeviceSums>> + Sync;

    fn the_sums_are_right(devices: &Connect) {
        let got = among(3, |ranks| {
            let connected = devices(ranks).map(|devices| Connected::by(ranks, devices));
            let ranks = connected.as_ref().map_or(ranks, |connected| connected as &dyn Collective);
            // The first fills a bucket and more; nobody has a gradient of the last.
            let sizes = [BUCKET + 5, 3, 1, 4];
            let vars = sizes.map(|size| Var::ones(size, candle_core::DType::F32, &Device::Cpu).unwrap());
            let rank = ranks.rank() as f64;
            // d/dv of rank · Σ v² is 2 · rank; the third variable is rank 2's alone.
            let mut loss = (vars[0].sqr().unwrap().sum_all().unwrap() * rank).unwrap();
            loss = (loss + (vars[1].sqr().unwrap().sum_all().unwrap() * (rank + 1.0)).unwrap()).unwrap();
            if ranks.rank() == 2 {
                loss = (loss + vars[2].sum_all().unwrap()).unwrap();
            }
            let mut gradients = loss.backward().unwrap();
            all_reduce(ranks, &vars, &mut gradients).unwrap();
            vars.map(|var| gradients.get(&var).map(|g| g.to_vec1::<f32>().unwrap()))
        });
        for [first, second, third, last] in got {
            assert!(first.unwrap() == vec![6.0; BUCKET + 5]);
            assert_eq!((second, third, last), (Some(vec![12.0; 3]), Some(vec![1.0]), None));
        }
    }
}
