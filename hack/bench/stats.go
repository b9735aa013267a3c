// SPDX-License-Identifier: Apache-2.0

// What is made of the rounds: medians, ratios, and how sure these are.

package main

import (
	"fmt"
	"math"
	"slices"
)

// none fills the cell of what was not measured.
const none = "–"

// confidence of an interval.
const confidence = 0.95

// slower is the ratio to TCP below which a row counts as slower.
const slower = 0.97

// estimate is a median of ratios with its interval. low and high are infinite if there
// were too few rounds for one. The zero value stands for what was not measured.
type estimate struct {
	median, low, high float64
}

// below says whether the whole interval is below the limit.
func (e estimate) below(limit float64) bool { return e != (estimate{}) && e.high < limit }

// short leaves out the interval.
func (e estimate) short() string {
	if e == (estimate{}) {
		return none
	}
	return fmt.Sprintf("%.2f", e.median)
}

func (e estimate) String() string {
	if e == (estimate{}) || math.IsInf(e.high, 0) {
		return e.short()
	}
	return fmt.Sprintf("%.2f (%.2f–%.2f)", e.median, e.low, e.high)
}

// ratio estimates how often get of base goes into that of the samples, from the ratio of
// each round: what happens to the machine over time then concerns both sides alike.
func ratio(samples, base []sample, get func(sample) float64) estimate {
	if len(samples) == 0 || len(samples) != len(base) {
		return estimate{}
	}
	ratios := make([]float64, len(samples))
	for i := range samples {
		of := get(base[i])
		if of == 0 {
			return estimate{} // this kind has no such figure
		}
		ratios[i] = get(samples[i]) / of
	}
	slices.Sort(ratios)
	e := estimate{middle(ratios), math.Inf(-1), math.Inf(1)}
	if rank := intervalRank(len(ratios)); rank > 0 {
		e.low, e.high = ratios[rank-1], ratios[len(ratios)-rank]
	}
	return e
}

// intervalRank returns k such that the true median is between the k-th smallest and the
// k-th largest of n values with the confidence at least, and 0 if n is too small. It
// takes for granted only that each value is as likely above the true median as below:
// fewer than k are below with the chance of fewer than k heads in n tosses of a coin.
func intervalRank(n int) int {
	fewer, chance := 0.0, math.Pow(0.5, float64(n)) // of 0 heads
	for heads := 0; heads < n; heads++ {
		fewer += chance
		if fewer > (1-confidence)/2 {
			return heads
		}
		chance *= float64(n-heads) / float64(heads+1)
	}
	return 0
}

// median of what get takes from each sample; 0 for none.
func median(samples []sample, get func(sample) float64) float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = get(s)
	}
	slices.Sort(values)
	return middle(values)
}

// middle is the median of sorted values; 0 for none.
func middle(sorted []float64) float64 {
	n := len(sorted)
	if n == 0 {
		return 0
	}
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// What ratios are made of: more is faster.

func rate(s sample) float64 { return s.Rate }

// tail is 0 for kinds without percentiles.
func tail(s sample) float64 {
	if s.P99 == 0 {
		return 0
	}
	return 1 / s.P99.Seconds()
}
