// Package lab is what the demo and the end-to-end tests are made with: the
// demo's image, a registry that can hold a download, a daemon as a real
// process, a prober that measures downtime, and an inventory of what a daemon
// has made on the machine.
package lab

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	goruntime "runtime"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// DemoImage is the name that the demo's image is imported under.
const DemoImage = "workspaced.local/demo:1"

// ImagePath is the PATH that the demo's image sets.
const ImagePath = "/usr/bin:/bin"

// buildBase makes an image from nothing but the static program at path, as its
// entrypoint /envserver.
func buildBase(program string) (v1.Image, error) {
	data, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
		Architecture: goruntime.GOARCH,
		OS:           "linux",
		Config:       v1.Config{Entrypoint: []string{"/envserver"}, Env: []string{"PATH=" + ImagePath}},
		RootFS:       v1.RootFS{Type: "layers"},
	})
	if err != nil {
		return nil, err
	}
	return AddFile(img, "envserver", 0o755, data)
}

// withVersion adds a file /version with the text, which tells images apart, in a
// layer of its own, the last.
func withVersion(base v1.Image, version string) (v1.Image, error) {
	return AddFile(base, "version", 0o644, []byte(version))
}

// AddFile adds a file in a layer of its own.
func AddFile(img v1.Image, name string, mode int64, content []byte) (v1.Image, error) {
	return AddCompressed(img, name, mode, content, compression.GZip)
}

// AddCompressed is AddFile with another compression than gzip.
func AddCompressed(img v1.Image, name string, mode int64, content []byte, with compression.Compression) (v1.Image, error) {
	layer, err := fileLayer(tar.Header{Name: name, Mode: mode, Size: int64(len(content))}, content, with)
	if err != nil {
		return nil, err
	}
	return mutate.Append(img, mutate.Addendum{Layer: layer, MediaType: mediaTypes[with]})
}

// mediaTypes are those of layers. Images of Docker's format have no zstd.
var mediaTypes = map[compression.Compression]types.MediaType{
	compression.GZip: types.DockerLayer,
	compression.ZStd: types.OCILayerZStd,
}

func fileLayer(header tar.Header, content []byte, with compression.Compression) (v1.Layer, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&header); err != nil {
		return nil, err
	}
	if _, err := w.Write(content); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	}, tarball.WithCompression(with), tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithCompressedCaching)
}

// WriteImage writes the image as a tar that `docker load` and workspaced's
// import_images take.
func WriteImage(img v1.Image, ref, path string) error {
	tag, err := name.NewTag(ref)
	if err != nil {
		return fmt.Errorf("image name %q: %w", ref, err)
	}
	return tarball.WriteToFile(path, tag, img)
}
