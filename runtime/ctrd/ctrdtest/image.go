package ctrdtest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	goruntime "runtime"
)

// File is a file of an image; a directory when its name ends with a slash.
type File struct {
	Name string
	Mode int64
	Data []byte
}

// BuildImage makes an image of one layer, for this machine unless the
// configuration names another architecture.
func BuildImage(tb testing.TB, config v1.ConfigFile, files ...File) v1.Image {
	tb.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		header := &tar.Header{Name: f.Name, Mode: f.Mode, Size: int64(len(f.Data)), Typeflag: tar.TypeReg}
		if f.Name[len(f.Name)-1] == '/' {
			header.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(header); err != nil {
			tb.Fatal(err)
		}
		if _, err := w.Write(f.Data); err != nil {
			tb.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(b.Bytes())), nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		tb.Fatal(err)
	}
	base, err := img.ConfigFile()
	if err != nil {
		tb.Fatal(err)
	}
	config.RootFS, config.History = base.RootFS, base.History
	if config.OS == "" {
		config.OS = "linux"
	}
	if config.Architecture == "" {
		config.Architecture = goruntime.GOARCH
	}
	if img, err = mutate.ConfigFile(img, &config); err != nil {
		tb.Fatal(err)
	}
	return img
}

// The test image has testprog in a root that is empty but for what tests need.
const (
	// Prog is testprog, which stays up until SIGTERM without arguments.
	Prog = "/bin/testprog"
	// UserName is in the image's /etc/passwd with these ids and this home, and in
	// the group ExtraGroup.
	UserName   = "app"
	UserID     = 1234
	GroupID    = 2345
	ExtraGroup = 3456
	UserHome   = "/home/app"
	// WorkingDir exists.
	WorkingDir = "/srv/work"
	// These are no programs: without execute permission; for another machine; a
	// script whose interpreter does not exist; a text without one; a dynamic
	// program whose loader does not exist; an ELF file that only execve finds
	// broken.
	NotExecutable     = "/bin/noexec"
	WrongArchitecture = "/bin/foreign"
	NoInterpreter     = "/bin/nointerpreter"
	NoFormat          = "/bin/noformat"
	NoLoader          = "/bin/noloader"
	Broken            = "/bin/broken"
)

// AwaitReady waits until testprog, which was just executed, handles its signals,
// or has ended.
func AwaitReady(tb testing.TB, pid int) {
	tb.Helper()
	waits := true
	defer func() {
		if waits {
			for _, file := range []string{"cmdline", "comm", "stack", "status", "cgroup"} {
				b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
				tb.Logf("process %d, %s: %q %v", pid, file, b, err)
			}
		}
	}()
	Eventually(tb, "the command handles signals", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		return err != nil || string(b) == "ready\n" || Ended(pid)
	})
	waits = false
}

// Ended tells whether there is no process, or one that only waits for its
// parent to notice. Its first thread may have ended before the others.
func Ended(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err == nil && !bytes.Contains(b, []byte(") Z ")) && !bytes.Contains(b, []byte(") X ")) { // X: being reaped just now
		return false
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	return err != nil || len(threads) <= 1
}

// TestEnv is the test image's environment.
var TestEnv = []string{"PATH=/usr/bin:/bin", "HOME=/root", "IMAGE=yes"}

// TestImage returns the test image.
func TestImage(tb testing.TB) v1.Image {
	tb.Helper()
	prog := Program(tb, "runtime/ctrd/ctrdtest/testprog")
	foreign := bytes.Clone(prog)
	foreign[18], foreign[19] = 8, 0 // EM_MIPS
	broken := bytes.Clone(prog)
	broken[16] = 1 // ET_REL
	return BuildImage(tb,
		v1.ConfigFile{Config: v1.Config{Entrypoint: []string{Prog}, Cmd: []string{"serve"}, Env: TestEnv}},
		File{Name: "bin/", Mode: 0o755},
		File{Name: "etc/", Mode: 0o755},
		File{Name: "srv/", Mode: 0o755},
		File{Name: "tmp/", Mode: 0o1777},
		File{Name: WorkingDir[1:] + "/", Mode: 0o755},
		File{Name: "etc/passwd", Mode: 0o644, Data: []byte("root:x:0:0::/root:/\napp:x:1234:2345::/home/app:/\n")},
		File{Name: "etc/group", Mode: 0o644, Data: []byte("root:x:0:\napp:x:2345:\nextra:x:3456:app\n")},
		File{Name: Prog[1:], Mode: 0o755, Data: prog},
		File{Name: NotExecutable[1:], Mode: 0o644, Data: prog[:1024]},
		File{Name: WrongArchitecture[1:], Mode: 0o755, Data: foreign[:1024]},
		File{Name: NoInterpreter[1:], Mode: 0o755, Data: []byte("#!/bin/nosuchshell -e\n")},
		File{Name: NoFormat[1:], Mode: 0o755, Data: []byte("echo hello\n")},
		File{Name: NoLoader[1:], Mode: 0o755, Data: dynamicELF("/lib/ld-none.so.1")},
		File{Name: Broken[1:], Mode: 0o755, Data: broken[:8192]},
	)
}

// dynamicELF is the start of a 64-bit little-endian program for this machine
// that asks for a loader.
func dynamicELF(loader string) []byte {
	machine := map[string]byte{"amd64": 62, "arm64": 183}[goruntime.GOARCH]
	b := make([]byte, 64+56, 256)
	copy(b, "\x7fELF\x02\x01\x01")
	b[16], b[18], b[20] = 2, machine, 1        // ET_EXEC, machine, version
	b[32], b[52], b[54], b[56] = 64, 64, 56, 1 // program headers' offset; sizes; count
	header := b[64:]
	header[0], header[4] = 3, 4 // PT_INTERP, readable
	header[8] = 64 + 56
	header[32], header[40] = byte(len(loader)+1), byte(len(loader)+1)
	return append(append(b, loader...), 0)
}

// NoCommandImage returns one that names no command.
func NoCommandImage(tb testing.TB) v1.Image {
	tb.Helper()
	return BuildImage(tb, v1.ConfigFile{}, File{Name: "file", Mode: 0o644})
}

// SaveImage writes the image as `docker save` does, and returns the file.
func SaveImage(tb testing.TB, ref string, img v1.Image) string {
	tb.Helper()
	tag, err := name.NewTag(ref)
	if err != nil {
		tb.Fatal(err)
	}
	f, err := os.Create(filepath.Join(tb.TempDir(), "image.tar"))
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	if err := tarball.Write(tag, img, f); err != nil {
		tb.Fatal(err)
	}
	return f.Name()
}
