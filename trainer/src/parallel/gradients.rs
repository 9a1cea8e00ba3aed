//! Sums of gradients over the ranks.

use std::sync::mpsc;
use std::thread;

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
/// # Errors
/// Those of candle; a rank that is gone.
pub fn all_reduce<'a>(
    ranks: &dyn Collective,
    variables: impl IntoIterator<Item = &'a Var>,
    gradients: &mut GradStore,
) -> Result<()> {
    start(ranks, variables, gradients)?;
    ranks.devices().map_or(Ok(()), DeviceSums::join)
}

/// As [`all_reduce`], but that sums between devices are only started: nothing may be made of them before
/// [`join`](DeviceSums::join).
fn start<'a>(ranks: &dyn Collective, variables: impl IntoIterator<Item = &'a Var>, gradients: &mut GradStore) -> Result<()> {
    let mut variables: Vec<&Var> = variables.into_iter().collect();
    let mut having: Vec<f32> = variables.iter().map(|var| f32::from(u8::from(gradients.get(var).is_some()))).collect();
    ranks.all_reduce(&mut having)?;
    let mut having = having.into_iter();
    variables.retain(|_| having.next().is_some_and(|ranks| ranks > 0.0));
    if let Some(devices) = ranks.devices() {
        return start_on_devices(devices, &variables, gradients);
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

/// Does work while gradients that it gives away are summed over the ranks; what the work gives, and the sums.
///
/// All ranks give away gradients by the same variables in the same order. The work itself exchanges nothing.
///
/// # Errors
/// Those of the work, and those of [`all_reduce`].
pub fn all_reduce_while<T>(ranks: &dyn Collective, work: impl FnOnce(&Early) -> Result<T>) -> Result<(T, GradStore)> {
    thread::scope(|scope| {
        let (given, received) = mpsc::channel::<(Vec<Var>, GradStore)>();
        let summing = scope.spawn(move || -> Result<GradStore> {
            let mut sums = GradStore::default();
            for (variables, mut gradients) in received {
                start(ranks, &variables, &mut gradients)?;
                // Each is given away once: nothing is added up here, before the sums are there.
                sums.extend(gradients)?;
            }
            Ok(sums)
        });
        let early = Early { given };
        let done = work(&early);
        drop(early);
        let sums = summing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ranks.devices().map_or(Ok(()), DeviceSums::join)?;
        Ok((done?, sums?))
    })
}

/// Where gradients are given away before all of them are there (see [`all_reduce_while`]).
pub struct Early {
    given: mpsc::Sender<(Vec<Var>, GradStore)>,
}

impl Early {
    /// Has these gradients summed by these variables, after all that were given away before. Returns at once.
    pub fn all_reduce(&self, variables: Vec<Var>, gradients: GradStore) {
        // Where nobody receives any more, a sum has failed, and its error is told when the work is done.
        let _ = self.given.send((variables, gradients));
    }
}

/// As [`start`], of the variables that some rank has a gradient of.
fn start_on_devices(devices: &dyn DeviceSums, variables: &[&Var], gradients: &mut GradStore) -> Result<()> {
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
    devices.start(&buckets.iter().map(|(bucket, _)| bucket.clone()).collect::<Vec<_>>())?;
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
    use super::super::testing::{among, between_devices};
    use super::*;

    #[test]
    fn every_rank_has_the_sums_also_of_what_it_had_no_gradient_of() {
        the_sums_are_right(&|_| None);
    }

    #[test]
    fn sums_between_devices_are_those_of_the_hosts() {
        the_sums_are_right(&|ranks| Some(between_devices(ranks)));
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

    #[test]
    fn what_is_given_away_early_is_summed_meanwhile() {
        let got = among(2, |ranks| {
            let vars = [3, 2, 4].map(|size| Var::ones(size, candle_core::DType::F32, &Device::Cpu).unwrap());
            let gradient = |var: &Var, value: f64| {
                let mut gradients = GradStore::default();
                gradients.insert(var, var.affine(value, 0.0).unwrap().detach());
                gradients
            };
            let rank = ranks.rank() as f64;
            let work = |early: &Early| {
                early.all_reduce(vec![vars[0].clone(), vars[1].clone()], gradient(&vars[0], 1.0 + rank));
                early.all_reduce(vec![vars[2].clone()], gradient(&vars[2], 10.0 * rank));
                Ok(7)
            };
            let (done, sums) = all_reduce_while(ranks, work).unwrap();
            let sums = vars.each_ref().map(|var| sums.get(var).map(|sum| sum.to_vec1::<f32>().unwrap()));
            // Work that fails is told, and what was given away before is summed, or the others would wait.
            let failed = all_reduce_while(ranks, |early| {
                early.all_reduce(vec![vars[0].clone()], gradient(&vars[0], 1.0));
                anyhow::bail!("no room")
            });
            (done, sums, failed.map(|((), _)| ()).unwrap_err().to_string())
        });
        let sums = || [Some(vec![3.0; 3]), None, Some(vec![10.0; 4])];
        assert_eq!(got, [(7, sums(), "no room".to_owned()), (7, sums(), "no room".to_owned())]);
    }
}
