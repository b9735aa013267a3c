// SPDX-License-Identifier: Apache-2.0

// Command measurements puts what a benchmark has printed between its marks in
// docs/measurements.md, and leaves the rest as it is: measurements PART FILE [PICTURE…].
// Pictures go beside the document. A run of some rows only changes nothing.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

const document = "docs/measurements.md"

// partial is the first line of a report that lacks rows.
const partial = "<!-- partial -->\n"

// The marks of a part, on lines of their own.
func marks(part string) (begin, end string) {
	return "<!-- " + part + ": made by make " + part + " -->\n", "<!-- end of " + part + " -->\n"
}

func main() {
	if err := run(os.Args[1:], document, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "measurements:", err)
		os.Exit(1)
	}
}

func run(args []string, document string, stdout io.Writer) error {
	if len(args) < 2 {
		return errors.New("accepted are a part, such as bench, the file with its text, and pictures")
	}
	text, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	if strings.HasPrefix(string(text), partial) {
		_, err := fmt.Fprintf(stdout, "%s has the result, of some rows only: %s stays as it is\n", args[1], document)
		return err
	}
	old, err := os.ReadFile(document)
	if err != nil {
		return err
	}
	begin, end := marks(args[0])
	before, rest, ok := strings.Cut(string(old), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s: the lines %q and %q are needed", document, begin, end)
	}
	for _, name := range args[2:] {
		picture, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(filepath.Dir(document), filepath.Base(name)), picture, 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(document, []byte(before+begin+"\n"+strings.TrimSpace(string(text))+"\n\n"+end+after), 0o644)
}
