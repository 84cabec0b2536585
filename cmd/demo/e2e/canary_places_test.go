package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/prototext"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/store/seal/canary"
)

// place is where something could be. All of it is searched, whether or not it has a
// row: the daemon's directories, processes, and what it says. A row says that the
// control has to be found there, so that the search is known to get there.
type place struct {
	name  string
	where string // a regular expression for Hit.Where
}

const coreFiles = "core files of containers"

var places = []place{
	{"the database", `/data/workspaced\.db$`},
	{"free pages of the database", `/free-pages\.db$`},
	{"the daemon's log", `/daemon\.log$`},
	{"containers' logs", `/data/logs/[^/]*$`},
	{"instances' records", `/instances/.*/record\.json$`},
	{"containerd's log", `/containerd\.log$`},
	{"containerd's metadata", `/io\.containerd\.metadata\.v1\.bolt/meta\.db$`},
	{"containerd's content, as it is", `/io\.containerd\.content\.v1\.content/blobs/[^ ]*$`},
	{"containerd's content, gzip", `/io\.containerd\.content\.v1\.content/blobs/.* > gzip > tar`},
	{"containerd's content, zstd", `/io\.containerd\.content\.v1\.content/blobs/.* > zstd > tar`},
	{"containers' files", `/snapshots/\d+/fs/`},
	{coreFiles, `/snapshots/\d+/fs/core[^/]*$`},
	{"bundles", `/io\.containerd\.runtime\.v2\.task/.*/config\.json$`},
	{"runc's state", `/runc/.*/state\.json$`},
	{"runc's arguments and environment", `/runc\.calls$`},
	{"containerd's events", `/containerd\.events$`},
	{"arguments of processes", `^/proc/\d+/cmdline$`},
	{"the daemon's environment", `^daemon's /proc/\d+/environ$`},
	{"containerd's environment", `^containerd's /proc/\d+/environ$`},
	{"shims' environment", `^shim's /proc/\d+/environ$`},
	{"files that are open and have no name", `^/proc/\d+/fd/\d+$`},
	{"/run", `^/run/`},
	{"metrics", `^metrics, `},
	{"the audit log", `^audit log$`},
	{"the audit log's copy", `/audit\.jsonl$`},
	{"answers", `^answers$`},
	{"errors", `^errors$`},
}

// told matches the places that the model may be in.
var told = regexp.MustCompile(`/data/workspaced\.db$|/free-pages\.db$|^answers$`)

// skipRoots leaves out what is mounted for containers: the snapshots are searched
// where they lie.
func skipRoots(path string, entry fs.DirEntry) bool {
	return entry.IsDir() && entry.Name() == "rootfs" && strings.Contains(path, "/io.containerd.runtime.v2.task/")
}

// look searches everything but processes, and complains about what does not belong
// there.
func (s *canaries) look() {
	s.t.Helper()
	for _, dir := range []string{s.Daemon.Base, s.dir, "/run"} {
		if err := s.search.Dir(dir); err != nil {
			s.t.Error(err)
		}
	}
	answers, failures := s.heard.take()
	s.search.Data("answers", answers)
	s.search.Data("errors", failures)
	s.complain()
}

// complain reports hits that are not the control's, once.
func (s *canaries) complain() {
	s.t.Helper()
	for _, h := range s.search.Hits[s.complained:] {
		switch {
		case strings.HasPrefix(h.Name, controlName):
		case h.Name == modelName && told.MatchString(h.Where):
		case s.isOwnFile(h):
			s.ownFiles++
		default:
			s.t.Error("a secret is in ", h)
		}
	}
	s.complained = len(s.search.Hits)
}

// instanceFile matches a secret's file in an instance's directory.
var instanceFile = regexp.MustCompile(`/instances/[^/]+/[^/]+/([^/]+)-[0-9a-f]{12}/files/`)

// isOwnFile reports whether it is a value of the workspace's own in one of its files,
// on the tmpfs that the driver has mounted for them.
func (s *canaries) isOwnFile(h canary.Hit) bool {
	m := instanceFile.FindStringSubmatch(h.Where)
	route, _, _ := strings.Cut(h.Name, ": ")
	if m == nil || m[1] != s.control+"-"+route {
		return false
	}
	var file, state unix.Stat_t
	var fs unix.Statfs_t
	// It may be gone with its instance.
	if err := errors.Join(unix.Lstat(h.Where, &file), unix.Statfs(h.Where, &fs)); err != nil {
		return errors.Is(err, unix.ENOENT)
	}
	return unix.Lstat(s.Daemon.StateDir(), &state) == nil && file.Dev != state.Dev && fs.Type == unix.TMPFS_MAGIC
}

// lookAtProcesses searches the processes of the machine, and what the daemon serves.
// Of a container's own processes only what others can see is searched: their
// environment has the secrets.
func (s *canaries) lookAtProcesses() {
	s.t.Helper()
	s.plant()
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		s.t.Fatal(err)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		s.t.Fatal(err)
	}
	inside := 0
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		look := s.search.Process
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)); err == nil && ns != own {
			look = s.search.CommandLine
			inside++
		}
		if err := look(pid); err != nil {
			s.t.Error(err)
		}
	}
	if inside < 5 {
		s.t.Errorf("only %d processes of containers run", inside)
	}
	s.roles()
	s.lookAtMetrics()
	s.complain()
}

// plant puts the control where the daemon itself does not.
func (s *canaries) plant() {
	s.t.Helper()
	for _, dir := range []string{"/run", s.dir} {
		f, err := os.CreateTemp(dir, "canary-")
		if err == nil {
			_, err = io.WriteString(f, s.control)
		}
		if err == nil && dir == "/run" {
			err = s.search.File(f.Name())
		}
		if err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(func() { _ = f.Close() }) // the second one is searched while it is open
		if err := os.Remove(f.Name()); err != nil {
			s.t.Fatal(err)
		}
	}
}

// roles adds hits that say whose environment they are in.
func (s *canaries) roles() {
	s.t.Helper()
	ctrd, err := s.Daemon.ContainerdPID()
	if err != nil {
		s.t.Fatal(err)
	}
	shims, err := s.Daemon.Shims()
	if err != nil {
		s.t.Fatal(err)
	}
	for role, pids := range map[string][]int{"daemon": {s.Daemon.PID()}, "containerd": {ctrd}, "shim": shims} {
		for _, pid := range pids {
			path := fmt.Sprintf("/proc/%d/environ", pid)
			env, err := os.ReadFile(path)
			if err != nil {
				s.t.Error(err)
			}
			s.search.Data(role+"'s "+path, env)
		}
	}
}

// lookAtMetrics searches what a scraper gets. No label tells a workspace, so the
// control is added.
func (s *canaries) lookAtMetrics() {
	s.t.Helper()
	socket := filepath.Join(s.dir, "metrics.sock")
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
	resp, err := client.Get("http://metrics/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || !strings.Contains(string(text), "workspaced_cycles_total") {
		s.t.Fatalf("metrics: %v\n%s", err, text)
	}
	s.search.Data("metrics", text)
	s.search.Data("metrics, and the control", append(text, s.control...))
}

// lookAtAuditLog searches all entries of the audit log.
func (s *canaries) lookAtAuditLog() {
	s.t.Helper()
	admin := workspacev1.NewAdminControlClient(s.Daemon.Conn())
	for token := ""; ; {
		page, err := admin.ListAuditEntries(s.ctx, &workspacev1.ListAuditEntriesRequest{PageSize: 1000, PageToken: token})
		if err != nil {
			s.t.Fatal(err)
		}
		s.search.Data("audit log", []byte(prototext.Format(page)))
		if token = page.NextPageToken; token == "" {
			break
		}
	}
	if log, err := admin.VerifyAuditLog(s.ctx, &workspacev1.VerifyAuditLogRequest{}); err != nil || !log.Intact {
		s.t.Errorf("the audit log: %v, %v", log, err)
	}
}

// lookAtFreePages searches a copy of the database, of which the control was deleted.
// The daemon must not run.
func (s *canaries) lookAtFreePages() {
	s.t.Helper()
	data, err := os.ReadFile(filepath.Join(s.Daemon.DataDir(), "workspaced.db"))
	if err != nil {
		s.t.Fatal(err)
	}
	path := filepath.Join(s.dir, "free-pages.db")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := deleteControl(path, s.values.Value(controlName+": deleted")); err != nil {
		s.t.Fatal(err)
	}
	if err := s.search.File(path); err != nil {
		s.t.Fatal(err)
	}
	if !slices.Contains(s.search.Hits, canary.Hit{Name: controlName + ": deleted", Form: "as it is", Where: path}) {
		s.t.Error("what was deleted from the database is not found in its free pages")
	}
	s.complain()
}

// deleteControl puts a value into a database, and deletes it.
func deleteControl(path, value string) error {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 5 * time.Second})
	if err != nil {
		return err
	}
	err = errors.Join(
		db.Update(func(tx *bolt.Tx) error {
			b, err := tx.CreateBucket([]byte("canary"))
			if err != nil {
				return err
			}
			return b.Put([]byte("key"), []byte(value))
		}),
		db.Update(func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte("canary")) }),
	)
	return errors.Join(err, db.Close())
}

// pushImage makes an image that has the control in its configuration, in a layer of
// each compression, and beside them /broken, which can't be executed.
func (s *canaries) pushImage() (ref string) {
	s.t.Helper()
	img, err := s.Image("1")
	for _, layer := range []struct {
		name  string
		with  compression.Compression
		bytes []byte
	}{
		{"gzip", compression.GZip, []byte(s.control)},
		{"zstd", compression.ZStd, []byte(s.control)},
		{"broken", compression.GZip, brokenProgram()},
	} {
		if err == nil {
			img, err = lab.AddCompressed(img, layer.name, 0o755, layer.bytes, layer.with)
		}
	}
	var config *v1.ConfigFile
	if err == nil {
		config, err = img.ConfigFile()
	}
	if err == nil {
		config = config.DeepCopy()
		config.Config.Env = append(config.Config.Env, "IMAGE="+s.control)
		img, err = mutate.ConfigFile(img, config)
	}
	if err == nil {
		ref, err = s.Registry.Push(s.ctx, img, "canary:1")
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return ref
}
