// SPDX-License-Identifier: Apache-2.0

package datapath

// For tests: as Open and OpenPins, with a function that is called between the
// steps of making the pins and of taking them down. Its error ends what is done.
var (
	OpenInSteps     = open
	OpenPinsInSteps = openPins
)
