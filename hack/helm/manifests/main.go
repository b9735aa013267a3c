// SPDX-License-Identifier: Apache-2.0

// Manifests fails unless each YAML document of its input is an object of the Kubernetes API
// or of the Prometheus operator's: no field unknown or given twice, no value of another type.
// It decodes as an API server does with kubectl's --validate=strict, and needs none.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	kubernetes "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

func main() {
	if err := check(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "manifests:", err)
		os.Exit(1)
	}
}

func check(manifests io.Reader) error {
	scheme := runtime.NewScheme()
	if err := errors.Join(kubernetes.AddToScheme(scheme), monitoring.AddToScheme(scheme)); err != nil {
		return err
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	documents := utilyaml.NewYAMLReader(bufio.NewReader(manifests))
	var errs []error
	objects := 0
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		var content map[string]any
		if err := yaml.Unmarshal(document, &content); err == nil && content == nil {
			continue // only a comment
		}
		objects++
		if _, _, err := decoder.Decode(document, nil, nil); err != nil {
			errs = append(errs, fmt.Errorf("object %d, kind %v: %w", objects, content["kind"], err))
		}
	}
	if objects == 0 {
		return errors.New("no object in the input")
	}
	return errors.Join(errs...)
}
