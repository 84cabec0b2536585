// Package proof shows on a running daemon, from outside, that it does its main
// job: whatever is changed, in whatever order and however fast, the workspace
// comes back with all of the latest values, after as few restarts as can be.
package proof

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// Config is what the proof is run with.
type Config struct {
	Client workspacev1.WorkspaceControlClient
	// Image is the demo's image, present; SlowImage the same in a registry which
	// waits at Hold.
	Image, SlowImage string
	Hold             *lab.Hold
	// VolumeDir is a directory that the workspace gets at /demo.
	VolumeDir string
	// WorkspaceID must be free.
	WorkspaceID string
	// Pairs is how often the old bug's repro is run.
	Pairs int
	// Out gets what happens and the tables.
	Out io.Writer
}

// Deadlines.
const (
	callTimeout = 30 * time.Second
	waitTimeout = time.Minute
)

// minMedian: fewer switches have no median to speak of, what else the machine does
// at that moment would decide.
const minMedian = 10

// checkDowntime says what is wrong with what the prober saw during the cycles
// that the workspace counts. A program that is replaced before it has answered
// once makes one gap of two switches; on a busy machine that happens now and
// then. What else the prober did not see, it has not measured.
//
// took is how long they took from the first to the last. A switch takes some 10 ms,
// most of it the start of the demo's program; preparing the new container while
// nothing runs would take it to about a whole cycle, on a machine of any speed.
func checkDowntime(down lab.Downtime, cycles int64, took time.Duration) error {
	merged := cycles / 20
	if cycles > 1 {
		merged = max(merged, 1)
	}
	if seen := int64(len(down.Gaps)); seen > cycles || seen < cycles-merged {
		return fmt.Errorf("%d switches were seen from outside, the workspace counts %d restarts", seen, cycles)
	}
	if down.Overlaps > 0 {
		return fmt.Errorf("an old container answered %d times after the new one", down.Overlaps)
	}
	if len(down.Gaps) < minMedian {
		return nil
	}
	if limit := took / time.Duration(cycles) / 2; down.Median() > limit {
		return fmt.Errorf("a switch took %s at the median, more than half of a cycle, %s", millis(down.Median()), millis(limit))
	}
	return nil
}

// run is a proof under way.
type run struct {
	Config
	name   string // workspaces/...
	socket string
	// want is the environment that callers asked for: spec, secrets and model.
	want map[string]string
	// id is the identity of the program that checkInside saw last.
	id string
}

// Run runs the proof. An error says what does not hold.
func Run(ctx context.Context, cfg Config) error {
	r := &run{
		Config: cfg,
		name:   "workspaces/" + cfg.WorkspaceID,
		socket: filepath.Join(cfg.VolumeDir, cfg.WorkspaceID+".sock"),
		want:   map[string]string{},
	}
	if err := r.create(ctx); err != nil {
		return fmt.Errorf("creating the workspace: %w", err)
	}
	if err := r.burst(ctx); err != nil {
		return fmt.Errorf("many changes during one cycle: %w", err)
	}
	if err := r.pairs(ctx); err != nil {
		return fmt.Errorf("two saves a few milliseconds apart: %w", err)
	}
	if err := r.remove(ctx); err != nil {
		return fmt.Errorf("deleting the workspace: %w", err)
	}
	return nil
}

func (r *run) printf(format string, args ...any) { fmt.Fprintf(r.Out, format, args...) }

// create makes the workspace and waits until it serves.
func (r *run) create(ctx context.Context) error {
	r.want["ENVSERVER_SOCKET"] = "/demo/" + r.WorkspaceID + ".sock"
	r.want["SETTING"] = "plain"
	r.want["FIRST_SECRET"] = "there from the start"
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := r.Client.CreateWorkspace(call, &workspacev1.CreateWorkspaceRequest{
		WorkspaceId: r.WorkspaceID,
		Workspace: &workspacev1.Workspace{Spec: &workspacev1.WorkspaceSpec{
			Image: r.Image,
			Env:   map[string]string{"ENVSERVER_SOCKET": r.want["ENVSERVER_SOCKET"], "SETTING": r.want["SETTING"]},
			Volumes: []*workspacev1.Volume{{
				MountPath: "/demo",
				Source:    &workspacev1.Volume_HostPath{HostPath: r.VolumeDir},
			}},
		}},
		Secrets: []*workspacev1.SecretValue{{
			Key:     "FIRST_SECRET",
			Payload: &workspacev1.SecretValue_Text{Text: r.want["FIRST_SECRET"]},
		}},
	})
	if err != nil {
		return err
	}
	w, err := r.wait(ctx, resp.Generation)
	if err != nil {
		return err
	}
	return r.checkInside(ctx, w)
}

// wait waits for a generation.
func (r *run) wait(ctx context.Context, generation int64) (*workspacev1.Workspace, error) {
	call, cancel := context.WithTimeout(ctx, waitTimeout)
	defer cancel()
	resp, err := r.Client.WaitWorkspace(call, &workspacev1.WaitWorkspaceRequest{Name: r.name, Generation: generation})
	if err != nil {
		w, getErr := r.get(ctx)
		return nil, fmt.Errorf("waiting for generation %d: %w (%v, last error: %v)", generation, errors.Join(err, getErr), w.GetState(), w.GetLastError())
	}
	if got := resp.Workspace.ObservedGeneration; got < generation {
		return nil, fmt.Errorf("waited for generation %d, observed is %d", generation, got)
	}
	return resp.Workspace, nil
}

func (r *run) get(ctx context.Context) (*workspacev1.Workspace, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := r.Client.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: r.name})
	return resp.GetWorkspace(), err
}

// checkInside compares the environment that the workspace's program sees with
// what was asked for, the daemon's own variables and the image's PATH: there
// must be these and no other.
func (r *run) checkInside(ctx context.Context, w *workspacev1.Workspace) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	generation := fmt.Sprint(w.ObservedGeneration)
	seen, err := lab.WaitInside(ctx, r.socket, func(s lab.Seen) bool { return s.Env["WORKSPACE_GENERATION"] == generation })
	if err != nil {
		return fmt.Errorf("no program of generation %s answers (the last was of %q): %w", generation, seen.Env["WORKSPACE_GENERATION"], err)
	}
	r.id = seen.ID
	want := maps.Clone(r.want)
	maps.Copy(want, map[string]string{
		"PATH":                 lab.ImagePath,
		"HOME":                 "/", // of root, in an image without /etc/passwd
		"WORKSPACE_ID":         r.WorkspaceID,
		"WORKSPACE_UID":        w.Uid,
		"WORKSPACE_GENERATION": generation,
	})
	return Compare(want, seen.Env)
}

// await waits until the prober too has seen the program that checkInside saw.
func (r *run) await(ctx context.Context, prober *lab.Prober) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return prober.Await(ctx, r.id)
}

// Compare says which variables differ.
func Compare(want, got map[string]string) error {
	var wrong []string
	for _, key := range slices.Sorted(maps.Keys(want)) {
		switch value, ok := got[key]; {
		case !ok:
			wrong = append(wrong, key+" is missing")
		case value != want[key]:
			wrong = append(wrong, fmt.Sprintf("%s is %q, was set to %q", key, value, want[key]))
		}
	}
	for _, key := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[key]; !ok {
			wrong = append(wrong, key+" is there and was not set, or was deleted")
		}
	}
	if len(wrong) > 0 {
		return errors.New("environment seen from inside: " + strings.Join(wrong, "; "))
	}
	return nil
}

// remove deletes the workspace and waits until it is gone.
func (r *run) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, waitTimeout)
	defer cancel()
	if _, err := r.Client.DeleteWorkspace(ctx, &workspacev1.DeleteWorkspaceRequest{Name: r.name}); err != nil {
		return err
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := r.get(ctx); status.Code(err) == codes.NotFound {
			return nil
		} else if err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("still there: %w", ctx.Err())
		}
	}
}

// table prints rows of two columns.
func (r *run) table(title string, rows [][2]string) error {
	r.printf("\n%s\n", title)
	w := tabwriter.NewWriter(r.Out, 0, 8, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintf(w, "  %s\t%s\n", row[0], row[1])
	}
	return w.Flush()
}

func millis(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}
