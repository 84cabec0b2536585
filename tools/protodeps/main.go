// Protodeps writes the .proto files that ours import into a folder, so that buf
// needs no schema registry: Go modules carry the descriptors, and this prints
// them as source again.
//
//	protodeps DIRECTORY
package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	"github.com/jhump/protoreflect/v2/protoprint"
	"google.golang.org/protobuf/reflect/protoregistry"

	// Each registers the descriptor of a file below.
	_ "buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
	_ "google.golang.org/genproto/googleapis/api/annotations"
)

// files are what our .proto files import, apart from google/protobuf, which
// buf knows by itself.
var files = []string{
	"buf/validate/validate.proto",
	"google/api/field_behavior.proto",
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: protodeps DIRECTORY")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "protodeps:", err)
		os.Exit(1)
	}
}

// write prints each of files below dir.
func write(dir string) error {
	printer := protoprint.Printer{}
	for _, path := range files {
		file, err := protoregistry.GlobalFiles.FindFileByPath(path)
		if err != nil {
			return fmt.Errorf("find %s: %w", path, err)
		}
		var source bytes.Buffer
		if err := printer.PrintProtoFile(file, &source); err != nil {
			return fmt.Errorf("print %s: %w", path, err)
		}
		target := filepath.Join(dir, filepath.FromSlash(path))
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(target, source.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}
