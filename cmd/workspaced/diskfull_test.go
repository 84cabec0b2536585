package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
)

// testImage is what the tests' image is called once it is imported.
const testImage = "workspaced.test/prog:1"

// TestContract22_DiskFullOfARunningDaemon: on a file system that is really full,
// which database, images and containers share, changes are refused and nothing
// else is; what runs goes on running, also across a restart of the daemon; and
// once there is room all is made up for.
func TestContract22_DiskFullOfARunningDaemon(t *testing.T) {
	needContainers(t)
	tar := ctrdtest.SaveImage(t, testImage, ctrdtest.TestImage(t))
	disk := t.TempDir()
	tmpfs(t, disk, "size=48m") // unmounted after the purge
	in := newInstance(t)
	in.args = append(in.args, "--data-dir="+filepath.Join(disk, "data"))
	filler := filepath.Join(disk, "filler")

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	f := &fullDisk{t: t, ctx: ctx, values: map[string]string{}}
	f.use(in.serve("--import-images=" + tar))
	f.create("a")
	f.create("b")
	b := f.get("b").GetContainerId()

	for round := range 3 {
		before := len(f.log.String())
		f.set("BEFORE", fmt.Sprint(round))
		fillUp(t, filler)
		f.changeUntilRefused(round)
		f.wantCycleEnd("a", before)
		f.wantServing()
		f.wantRunning("a", "")
		f.wantRunning("b", b) // which nobody has changed
		if round == 2 {
			// One that ends by itself meanwhile is not forgotten.
			if err := syscall.Kill(int(f.get("a").GetPid()), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			f.wantCycleEnd("a", len(f.log.String()))
		}
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		f.set("AFTER", fmt.Sprint(round))
		f.wantAllValues()
	}

	// A daemon that starts without room takes over what runs.
	a := f.get("a").GetContainerId()
	f.stop()
	fillUp(t, filler)
	f.use(in.serve())
	f.wantServing()
	f.wantRunning("a", a)
	f.wantRunning("b", b)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	f.set("AFTER", "restart")
	f.wantAllValues()
	f.wantRunning("b", b)
	f.stop()
}

// fullDisk is a daemon on a disk that is full at times.
type fullDisk struct {
	t   *testing.T
	ctx context.Context
	*serving
	client workspacev1.WorkspaceControlClient
	// values are the secrets of workspace a that were acknowledged.
	values map[string]string
}

func (f *fullDisk) use(s *serving) {
	f.serving, f.client = s, workspacev1.NewWorkspaceControlClient(s.conn)
}

func (f *fullDisk) stop() {
	f.t.Helper()
	if err := f.serving.stop(); err != nil {
		f.t.Error(err)
	}
}

func (f *fullDisk) create(id string) {
	f.t.Helper()
	if _, err := f.client.CreateWorkspace(f.ctx, &workspacev1.CreateWorkspaceRequest{
		WorkspaceId: id,
		Workspace:   &workspacev1.Workspace{Spec: &workspacev1.WorkspaceSpec{Image: testImage}},
	}); err != nil {
		f.t.Fatal(err)
	}
	if _, err := f.client.WaitWorkspace(f.ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/" + id}); err != nil {
		f.t.Fatalf("%v\n%s", err, f.log)
	}
}

func (f *fullDisk) get(id string) *workspacev1.Workspace {
	f.t.Helper()
	resp, err := f.client.GetWorkspace(f.ctx, &workspacev1.GetWorkspaceRequest{Name: "workspaces/" + id})
	if err != nil {
		f.t.Fatal(err)
	}
	return resp.GetWorkspace()
}

// trySet changes a secret of a, and notes it if that is acknowledged.
func (f *fullDisk) trySet(key, value string) error {
	_, err := f.client.SetSecret(f.ctx, &workspacev1.SetSecretRequest{
		Name: "workspaces/a/secrets/" + key, Payload: &workspacev1.SetSecretRequest_Text{Text: value},
	})
	if err == nil {
		f.values[key] = value
	}
	return err
}

func (f *fullDisk) set(key, value string) {
	f.t.Helper()
	if err := f.trySet(key, value); err != nil {
		f.t.Fatalf("with room: %v\n%s", err, f.log)
	}
}

// changeUntilRefused uses up what is left in the database's own free pages.
func (f *fullDisk) changeUntilRefused(round int) {
	f.t.Helper()
	for i := range 1000 {
		err := f.trySet(fmt.Sprintf("K%d_%d", round, i), strings.Repeat("x", 500))
		if err == nil {
			continue
		}
		if status.Code(err) != codes.ResourceExhausted {
			f.t.Fatalf("change %d: %v", i, err)
		}
		var reason string
		var retry time.Duration
		for _, d := range status.Convert(err).Details() {
			switch d := d.(type) {
			case *errdetails.ErrorInfo:
				reason = d.GetReason()
			case *errdetails.RetryInfo:
				retry = d.GetRetryDelay().AsDuration()
			}
		}
		if reason != "DISK_FULL" || retry <= 0 {
			f.t.Errorf("change %d: reason %q, retry in %v: %v", i, reason, retry, err)
		}
		return
	}
	f.t.Fatal("no change is refused")
}

// wantServing checks that reads are answered.
func (f *fullDisk) wantServing() {
	f.t.Helper()
	list, err := f.client.ListWorkspaces(f.ctx, &workspacev1.ListWorkspacesRequest{})
	if err != nil || len(list.GetWorkspaces()) != 2 {
		f.t.Errorf("list: %v, %v", list, err)
	}
	secrets, err := f.client.ListSecrets(f.ctx, &workspacev1.ListSecretsRequest{Parent: "workspaces/a", PageSize: 1000})
	if err != nil || len(secrets.GetSecrets()) != len(f.values) {
		f.t.Errorf("%d secrets, %d were acknowledged: %v", len(secrets.GetSecrets()), len(f.values), err)
	}
	watch, cancel := context.WithCancel(f.ctx)
	defer cancel()
	stream, err := f.client.WatchWorkspaces(watch, &workspacev1.WatchWorkspacesRequest{})
	if err != nil {
		f.t.Fatal(err)
	}
	for {
		event, err := stream.Recv()
		if err != nil {
			f.t.Fatalf("watch: %v", err)
		}
		if event.GetSynced() != nil {
			break
		}
	}
	health, err := healthv1.NewHealthClient(f.conn).Check(f.ctx, &healthv1.HealthCheckRequest{})
	if err != nil || health.Status != healthv1.HealthCheckResponse_SERVING {
		f.t.Errorf("health: %v, %v", health, err)
	}
}

// cycleEnd is what the log says of a cycle that has ended, well or not.
var cycleEnd = regexp.MustCompile(`(?m)^.*(?:container started|level=(?:WARN|ERROR)).* workspace=(\S+).*$`)

// wantCycleEnd waits until the log tells, behind a place in it, that a cycle of
// the workspace has ended.
func (f *fullDisk) wantCycleEnd(id string, behind int) {
	f.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		for _, line := range cycleEnd.FindAllStringSubmatch(f.log.String()[behind:], -1) {
			if line[1] == id {
				return
			}
		}
		select {
		case <-tick.C:
		case <-f.ctx.Done():
			f.t.Fatalf("the cycle of %s does not end\n%s", id, f.log)
		}
	}
}

// wantRunning checks that the workspace has a process, and unless it is empty,
// this container.
func (f *fullDisk) wantRunning(id, container string) {
	f.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		w := f.get(id)
		if container != "" && w.GetContainerId() != container {
			f.t.Errorf("%s was restarted: %v", id, w)
			return
		}
		if environ(f.t, w.GetPid())["WORKSPACE_ID"] == id {
			return
		}
		select {
		case <-tick.C: // it may be on its way from one container to the next
		case <-f.ctx.Done():
			f.t.Fatalf("%s does not run: %v\n%s", id, w, f.log)
		}
	}
}

// wantAllValues waits until a has a container with everything that was
// acknowledged.
func (f *fullDisk) wantAllValues() {
	f.t.Helper()
	resp, err := f.client.WaitWorkspace(f.ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/a"})
	if err != nil {
		f.t.Fatalf("%v\n%s", err, f.log)
	}
	has := environ(f.t, resp.GetWorkspace().GetPid())
	for key, value := range f.values {
		if got, ok := has[key]; !ok || got != value {
			f.t.Errorf("of what was acknowledged a has %s: %v, as %q", key, ok, got)
		}
	}
}

// environ is the environment of a process; nil: there is none.
func environ(t *testing.T, pid int32) map[string]string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return nil
	}
	env := map[string]string{}
	for kv := range bytes.SplitSeq(data, []byte{0}) {
		key, value, _ := strings.Cut(string(kv), "=")
		env[key] = value
	}
	return env
}
