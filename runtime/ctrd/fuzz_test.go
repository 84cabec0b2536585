package ctrd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	containerdreference "github.com/containerd/containerd/v2/pkg/reference"
	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// Whatever a record file holds, it is this instance's record, or none.
func FuzzDecodeRecord(f *testing.F) {
	const uid, id = "uid-a", "a-0123456789ab"
	whole := &record{ID: id, WorkspaceID: "a", WorkspaceUID: uid, PreparedGeneration: 7, ImageDigest: "sha256:0", PID: 5, PIDStart: 6, Init: fileID{1, 2},
		Launch:   &launchRecord{Generation: 7, SecretVersions: map[string]int64{"KEY": 1}, StartTime: time.Unix(1, 0).UTC()},
		Stopping: true, Removing: true, Exit: &runtime.Exit{Code: 3, Known: true, Time: time.Unix(2, 0).UTC()}}
	for _, edit := range []func(r *record){
		func(*record) {},
		func(r *record) { *r = record{ID: id, WorkspaceID: "a", WorkspaceUID: uid} },
		func(r *record) { r.ID = "b-0123456789ab" },
		func(r *record) { r.WorkspaceUID = "uid-b" },
		func(r *record) { r.WorkspaceID = "../.." },
		func(r *record) { r.PID = -1 },
		func(r *record) { r.PIDStart = 0 },
	} {
		r := *whole
		edit(&r)
		b, err := json.Marshal(&r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(b[:len(b)/2])
	}
	for _, text := range []string{"", "null", "[]", "{}", `{"id":null}`, `{"ID":"a-0123456789ab","Workspace_UID":"uid-a","workspace_id":"a"}`,
		`{"id":"b","id":"a-0123456789ab","workspace_uid":"uid-a","workspace_id":"a","pid":1e999}`, strings.Repeat("[", 20000)} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeRecord(data, uid, id)
		if err != nil {
			if r != nil {
				t.Fatalf("a record beside the error %v", err)
			}
			return
		}
		if r.ID != id || r.WorkspaceUID != uid || !workspaceID.MatchString(r.WorkspaceID) || r.PID < 0 || r.PID == 0 && r.PIDStart != 0 {
			t.Fatalf("%q was taken as %+v", data, r)
		}
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatalf("%+v can't be written again: %v", r, err)
		}
		again, err := decodeRecord(b, uid, id)
		if err != nil || !cmp.Equal(r, again) {
			t.Fatalf("%+v is read again as %+v, %v", r, again, err)
		}
	})
}

// Whatever stands where an image's name should, it is refused as such, or has
// one name that containerd takes.
func FuzzImageReference(f *testing.F) {
	digest := "@sha256:" + strings.Repeat("0", 64)
	for _, ref := range []string{
		"", "redis", "redis:7", "docker.io/library/redis", "index.docker.io/redis", "user/image", "localhost/image", "localhost:5000/image:1",
		"127.0.0.1:5000/a/b/c:tag", "[::1]:5000/image", "[fe80::1%25eth0]/image", "registry.test/image" + digest, "registry.test/image:1" + digest,
		"image@sha256:12", "image@sha512:" + strings.Repeat("a", 128), "IMAGE", "Registry.Test/image", "registry.test/IMAGE", "a b", "a\nb", "a\x00b", "\xff",
		"../x", "/x", "x/", "x//y", "x:", "x:tag:tag", ":tag", "@", digest, "http://registry.test/image", "registry.test:99999/image", "registry.test:/image",
		strings.Repeat("0", 64), "a/" + strings.Repeat("b/", 200) + "c", strings.Repeat("a", 300), "image:" + strings.Repeat("t", 129), "xn--bcher-kva.test/image", "ä.test/image",
	} {
		f.Add(ref)
	}
	f.Fuzz(func(t *testing.T, ref string) {
		name, err := normalize(ref)
		if err != nil {
			var e *runtime.Error
			if !errors.As(err, &e) || e.Reason != runtime.ReasonImageInvalid || !e.Permanent || !utf8.ValidString(e.Message) || len(e.Message) > 2000 {
				t.Fatalf("%q: %v", ref, err)
			}
			return
		}
		if again, err := normalize(name); err != nil || again != name {
			t.Fatalf("%q is %q, which is %q, %v", ref, name, again, err)
		}
		if spec, err := containerdreference.Parse(name); err != nil || spec.String() != name || spec.Hostname() == "" || spec.Object == "" {
			t.Fatalf("%q is %q, which containerd reads as %+v, %v", ref, name, spec, err)
		}
	})
}

// Whatever comes through the result FIFO, a command runs only when its init has
// said so, and then ended the FIFO as execve does.
func FuzzAwaitExec(f *testing.F) {
	result := func(kinds ...handshake.Kind) []byte {
		var b bytes.Buffer
		for _, k := range kinds {
			if err := handshake.WriteResult(&b, handshake.Result{Kind: k}); err != nil {
				f.Fatal(err)
			}
		}
		return b.Bytes()
	}
	f.Add([]byte{})
	f.Add(result(handshake.Executing))
	f.Add(result(handshake.Executing)[:10])
	f.Add(result(handshake.Ready))
	f.Add(result(handshake.Ready, handshake.Executing))
	f.Add(result(handshake.Executing, handshake.Executing))
	f.Add(result(handshake.Executing, handshake.Failed))
	f.Add(result(handshake.Executing, handshake.Failed, handshake.Executing))
	f.Add(append(result(handshake.Executing), 'x'))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 32<<10 {
			t.Skip("a FIFO does not take it at once")
		}
		read, write, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		s := &standby{result: read, goAhead: write}
		defer s.close()
		if _, err := write.Write(data); err != nil {
			t.Fatal(err)
		}
		write.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		err = s.awaitExec(ctx)
		if want := execs(data); (err == nil) != want || ctx.Err() != nil {
			t.Fatalf("%q: %v, want it to run: %t", data, err, want)
		}
	})
}

func execs(data []byte) bool {
	executing := false
	for r := bytes.NewReader(data); ; {
		res, err := handshake.ReadResult(r)
		switch {
		case err != nil:
			return executing && errors.Is(err, io.EOF)
		case res.Kind == handshake.Failed:
			return false
		case res.Kind == handshake.Executing:
			executing = true
		}
	}
}
