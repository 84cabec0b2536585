package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// Stage is a place for a demo or a test: a directory with a daemon that has the
// demo's image, a registry, and a directory for the workspaces' sockets.
type Stage struct {
	Daemon   *Daemon
	Registry *Registry
	// VolumeDir is what workspaces mount at /demo.
	VolumeDir string

	base v1.Image // what all versions of the demo's image share
}

// Options of a stage.
type Options struct {
	// BinDir has workspaced, workspace-init and envserver.
	BinDir string
	// Group, when not negative, is the group that may use the daemon's socket.
	Group int
	// Args are further flags of the daemon.
	Args []string
	// Path, if set, comes before the daemon's PATH: another containerd and shim.
	Path string
	// Faults runs the daemon that fails as Daemon.SetFaults says.
	Faults bool
	// OwnContainerd starts a containerd that is not the daemon's child.
	OwnContainerd bool
	// DialOptions are further options of the daemon's client.
	DialOptions []grpc.DialOption
	// Tmpfs puts everything into memory: quick where nothing depends on a disk.
	Tmpfs bool
}

// NewStage makes a stage; its daemon is not started. Close removes it, also
// after a failure of Start.
func NewStage(opts Options) (_ *Stage, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("must run as root: containers, mounts and cgroups need it")
	}
	binaries := map[string]string{}
	daemon := "workspaced"
	if opts.Faults {
		daemon = FaultsProgram
	}
	for _, name := range []string{daemon, "workspace-init", "envserver"} {
		path, err := filepath.Abs(filepath.Join(opts.BinDir, name))
		if err != nil {
			return nil, err
		}
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("%w: run make build", err)
		}
		binaries[name] = path
	}

	// A short name: a socket's path takes 107 bytes.
	base, err := os.MkdirTemp("", "workspaced-")
	if err != nil {
		return nil, err
	}
	if base, err = filepath.EvalSymlinks(base); err != nil {
		return nil, err
	}
	s := &Stage{VolumeDir: filepath.Join(base, "demo")}
	defer func() {
		if err != nil {
			if s.Registry != nil {
				err = errors.Join(err, s.Registry.Close())
			}
			err = errors.Join(err, removeBase(base))
		}
	}()
	if opts.Tmpfs {
		if err := unix.Mount("lab", base, "tmpfs", 0, "mode=0700"); err != nil {
			return nil, fmt.Errorf("tmpfs at %s: %w", base, err)
		}
	}
	if err := os.Mkdir(s.VolumeDir, 0o755); err != nil {
		return nil, err
	}
	if s.base, err = buildBase(binaries["envserver"]); err != nil {
		return nil, err
	}
	img, err := s.Image("1")
	if err != nil {
		return nil, err
	}
	tar := filepath.Join(base, "demo.tar")
	if err := WriteImage(img, DemoImage, tar); err != nil {
		return nil, err
	}
	if s.Registry, err = NewRegistry(); err != nil {
		return nil, err
	}
	args := []string{"--import-images", tar, "--plain-http-registries", s.Registry.Host, "--allowed-host-paths", s.VolumeDir}
	if opts.Group >= 0 {
		if err := errors.Join(os.Chown(base, -1, opts.Group), os.Chmod(base, 0o750)); err != nil {
			return nil, err
		}
		args = append(args, "--socket-group", strconv.Itoa(opts.Group))
	}
	s.Daemon = &Daemon{Binary: binaries[daemon], Base: base, Args: append(args, opts.Args...), Path: opts.Path, DialOptions: opts.DialOptions}
	if opts.Faults {
		s.Daemon.faults = filepath.Join(base, "faults")
	}
	if opts.OwnContainerd {
		s.Daemon.Own = &Containerd{Dir: filepath.Join(base, "ctrd"), Path: opts.Path}
	}
	return s, nil
}

// removeBase removes the directory, and the tmpfs on it if there is one.
func removeBase(base string) error {
	entries, err := os.ReadDir(base)
	if err != nil {
		return err
	}
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(base, e.Name())))
	}
	if err := unix.Unmount(base, 0); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: it is no mount point
		return fmt.Errorf("unmount %s: %w", base, err)
	}
	return errors.Join(err, os.Remove(base))
}

// PushSlow puts another version of the demo's image into the registry and holds
// its download.
func (s *Stage) PushSlow(ctx context.Context, version string) (ref string, hold *Hold, err error) {
	img, err := s.Image(version)
	if err != nil {
		return "", nil, err
	}
	if hold, err = s.Registry.HoldLast(img); err != nil {
		return "", nil, err
	}
	if ref, err = s.Registry.Push(ctx, img, "demo:"+version); err != nil {
		return "", nil, err
	}
	return ref, hold, nil
}

// Image is the demo's image in another version.
func (s *Stage) Image(version string) (v1.Image, error) { return withVersion(s.base, version) }

// Socket is where a workspace's envserver is reached that was created with
// ENVSERVER_SOCKET=/demo/<id>.sock.
func (s *Stage) Socket(id string) string { return filepath.Join(s.VolumeDir, id+".sock") }

// Close ends the daemon, removes all that it and the stage made, and makes sure
// that nothing is left.
func (s *Stage) Close(ctx context.Context) error {
	stopErr := s.Daemon.Stop()
	instances, logErr := s.Daemon.instances()
	regErr := s.Registry.Close()
	own := s.Daemon.Own
	if own != nil && own.PID() == 0 {
		stopErr = errors.Join(stopErr, own.Start(ctx)) // purge asks it
	}
	if err := s.Daemon.Purge(ctx); err != nil {
		return errors.Join(stopErr, regErr, err, fmt.Errorf("%s was not removed", s.Daemon.Base))
	}
	if own != nil {
		stopErr = errors.Join(stopErr, own.Stop())
	}
	// What purge left below the data and state directory is a leak, not ours to
	// sweep away.
	left := leftAfterPurge(s.Daemon)
	cgroups, cgroupErr := cgroupsNamed(instances)
	if cgroups > 0 {
		left = append(left, fmt.Sprintf("cgroups of %d containers", cgroups))
	}
	if err := errors.Join(stopErr, regErr, logErr, cgroupErr, removeBase(s.Daemon.Base)); err != nil {
		return err
	}
	more, err := s.waitNothing(ctx)
	if err != nil {
		return err
	}
	if left = append(left, more...); len(left) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(left, ", "))
	}
	return nil
}

func leftAfterPurge(d *Daemon) (left []string) {
	for _, dir := range []string{d.DataDir(), d.StateDir()} {
		if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
			left = append(left, "directory "+dir)
		}
	}
	return left
}

// waitNothing gives processes that were told to end a moment for it.
func (s *Stage) waitNothing(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		left, err := Leftovers(s.Daemon.Base)
		if err != nil || len(left) == 0 {
			return left, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return left, nil
		}
	}
}
