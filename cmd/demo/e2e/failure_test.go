package e2e

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

const (
	running  = workspacev1.WorkspaceState_WORKSPACE_STATE_RUNNING
	degraded = workspacev1.WorkspaceState_WORKSPACE_STATE_DEGRADED
	stopped  = workspacev1.WorkspaceState_WORKSPACE_STATE_STOPPED
)

// update changes fields of a workspace's spec.
func (s *stage) update(id string, spec *workspacev1.WorkspaceSpec, paths ...string) int64 {
	s.t.Helper()
	resp, err := s.client().UpdateWorkspace(s.ctx, updateSpec(id, spec, paths...))
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.Generation
}

func updateSpec(id string, spec *workspacev1.WorkspaceSpec, paths ...string) *workspacev1.UpdateWorkspaceRequest {
	return &workspacev1.UpdateWorkspaceRequest{
		Workspace:  &workspacev1.Workspace{Name: "workspaces/" + id, Spec: spec},
		UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
	}
}

// Promise 5: what can't be started leaves the old container running, says why,
// and is healed by the next good change.
func TestContract05_NeverWorseOff(t *testing.T) {
	s := newStage(t, 4*time.Minute)
	nowhere := s.Registry.Host + "/nowhere:1"
	for _, tt := range []struct {
		id, reason, says string
		breakIt          func(id string)
		heal             func(id string) int64
	}{
		{
			id: "pull", reason: "IMAGE_NOT_FOUND", says: nowhere,
			breakIt: func(id string) { s.update(id, &workspacev1.WorkspaceSpec{Image: nowhere}, "spec.image") },
			heal: func(id string) int64 {
				return s.update(id, s.spec(id), "spec.image")
			},
		},
		{
			id: "unreachable", reason: "IMAGE_PULL_FAILED", says: "127.0.0.1:1",
			breakIt: func(id string) {
				s.update(id, &workspacev1.WorkspaceSpec{Image: "127.0.0.1:1/demo:1"}, "spec.image")
			},
			heal: func(id string) int64 { return s.update(id, s.spec(id), "spec.image") },
		},
		{
			id: "command", reason: "COMMAND_NOT_FOUND", says: "/no/such/program",
			breakIt: func(id string) {
				s.update(id, &workspacev1.WorkspaceSpec{Command: []string{"/no/such/program"}}, "spec.command")
			},
			heal: func(id string) int64 { return s.update(id, &workspacev1.WorkspaceSpec{}, "spec.command") },
		},
		{
			id: "volume", reason: "VOLUME_UNAVAILABLE", says: "demo/missing",
			breakIt: func(id string) {
				spec := s.spec(id)
				spec.Volumes = append(spec.Volumes, &workspacev1.Volume{
					MountPath: "/more", Source: &workspacev1.Volume_HostPath{HostPath: filepath.Join(s.VolumeDir, "missing")},
				})
				s.update(id, spec, "spec.volumes")
			},
			heal: func(id string) int64 { return s.update(id, s.spec(id), "spec.volumes") },
		},
	} {
		t.Run(tt.id, func(t *testing.T) {
			s := &stage{Stage: s.Stage, t: t, ctx: s.ctx}
			s.create(tt.id, map[string]string{"OLD": "1"})
			was := s.identity(tt.id)
			tt.breakIt(tt.id)
			w := s.until(tt.id, "DEGRADED", func(w *workspacev1.Workspace) bool { return w.State == degraded })
			if got := w.GetLastError(); got.GetReason() != tt.reason || !strings.Contains(got.GetMessage(), tt.says) {
				t.Errorf("last error %v, want reason %s and a message with %q", got, tt.reason, tt.says)
			}
			if !w.Reconciling || w.Generation <= w.ObservedGeneration {
				t.Errorf("the change is not pending: %v", w)
			}
			if now := s.identity(tt.id); now != was {
				t.Errorf("the old container was touched: %+v, was %+v", now, was)
			}
			// A secret that comes meanwhile is not lost either.
			s.set(tt.id, "MEANWHILE", "2")
			generation := tt.heal(tt.id)
			w = s.wait(tt.id, generation)
			if w.LastError != nil || w.State != running {
				t.Errorf("not healed: %v", w)
			}
			checkEnv(t, s.inside(tt.id, w.ObservedGeneration), map[string]string{"OLD": "1", "MEANWHILE": "2"})
		})
	}
}

// Promise 18: a secret that can't be opened any more, here since the disk lost a
// bit of it, keeps the old container running, and the error names the key.
func TestContract18_UnreadableSecret(t *testing.T) {
	s := newStage(t, 2*time.Minute)
	s.create("one", map[string]string{"GOOD": "1", "ROTTEN": "the value that rots"})
	was := s.identity("one")
	if err := s.Daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := rot(filepath.Join(s.Daemon.DataDir(), "workspaced.db"), "ROTTEN"); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.set("one", "MORE", "2")
	w := s.until("one", "DEGRADED", func(w *workspacev1.Workspace) bool { return w.State == degraded })
	if got := w.GetLastError(); got.GetReason() != "SECRET_UNREADABLE" || !strings.Contains(got.GetMessage(), "ROTTEN") {
		t.Errorf("last error %v, want SECRET_UNREADABLE and the key", got)
	}
	if now := s.identity("one"); now != was {
		t.Errorf("the old container was touched: %+v, was %+v", now, was)
	}
	generation := s.set("one", "ROTTEN", "a new value")
	s.wait("one", generation)
	checkEnv(t, s.inside("one", generation), map[string]string{"GOOD": "1", "ROTTEN": "a new value", "MORE": "2"})
	s.settle(1)
}

// rot flips a bit of a key's current value, sealed.
func rot(path, key string) error {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 5 * time.Second})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		sealed := tx.Bucket([]byte("sealed"))
		c := sealed.Cursor()
		for k, v := c.Last(); k != nil; k, v = c.Prev() { // of several versions the newest one
			if strings.Contains(string(k), "/"+key+"\x00") {
				k, v = bytes.Clone(k), bytes.Clone(v)
				v[len(v)-1] ^= 1
				return sealed.Put(k, v)
			}
		}
		return errors.New("no such key in the database")
	})
	return errors.Join(err, db.Close())
}
