package ctrd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// defaultPath is PATH where neither image nor workspace set one.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

const (
	softFiles = 1024 // what programs that use select(2) can take
	hardFiles = 524288
	cpuPeriod = 100_000 // microseconds
	minQuota  = 1000    // microseconds, the kernel's least
)

// command returns what is executed: entrypoint and arguments as an OCI image's
// configuration and the spec's replacements say.
func command(spec runtime.Spec, image ocispec.ImageConfig) ([]string, error) {
	entrypoint, args := image.Entrypoint, image.Cmd
	if len(spec.Command) > 0 {
		entrypoint, args = spec.Command, nil
	}
	if len(spec.Args) > 0 {
		args = spec.Args
	}
	argv := slices.Concat(entrypoint, args)
	if len(argv) == 0 || argv[0] == "" {
		return nil, &runtime.Error{
			Reason: runtime.ReasonCommandMissing, Message: "neither the workspace nor its image names a command", Permanent: true,
		}
	}
	return argv, nil
}

// cgroupPath is the instance's cgroup, below one of its workspace.
func (d *Driver) cgroupPath(workspaceID, id string) string {
	return filepath.Join("/", d.cfg.Namespace, workspaceID, id)
}

// specOpts build config.json. Nothing in there is secret: anyone who can read
// containerd's state can read it.
func (d *Driver) specOpts(spec runtime.Spec, id string, image ocispec.ImageConfig, argv []string, mounts []specs.Mount, user specs.User) []oci.SpecOpts {
	// The OCI runtime makes an image's working directory where it is missing, as
	// everywhere; one that the workspace asks for has to exist.
	workingDir, cwd := spec.WorkingDir, "/"
	if workingDir == "" && image.WorkingDir != "" {
		workingDir = filepath.Join("/", image.WorkingDir)
		cwd = workingDir
	}
	if workingDir == "" {
		workingDir = "/"
	}
	formats := "own"
	if anyFormat() {
		formats = "any"
	}
	path := "PATH=" + lookupEnv(mergeEnv(image.Env, spec.Env), "PATH")

	opts := []oci.SpecOpts{
		oci.WithDefaultSpec(),
		specVersion,
		oci.WithProcessArgs(append([]string{handshake.InitPath, workingDir, formats}, argv...)...),
		oci.WithProcessCwd(cwd),
		// Init's own, of which the command gets nothing: a few threads less count
		// where the number of processes is limited.
		oci.WithEnv([]string{path, "GOMAXPROCS=1"}),
		oci.WithHostname(spec.WorkspaceID),
		oci.WithHostNamespace(specs.NetworkNamespace),
		oci.WithCgroup(d.cgroupPath(spec.WorkspaceID, id)),
		oci.WithRlimit(openFiles()),
		oci.WithRlimit(coreSize()),
	}
	if _, err := os.Stat("/etc/resolv.conf"); err == nil {
		opts = append(opts, oci.WithHostResolvconf)
	}
	if _, err := os.Stat("/etc/hosts"); err == nil {
		opts = append(opts, oci.WithHostHostsFile)
	}
	if spec.ReadOnlyRoot {
		opts = append(opts, oci.WithRootFSReadonly())
	}
	if n := spec.Resources.CPUMillis; n > 0 {
		opts = append(opts, oci.WithCPUCFS(max(n*cpuPeriod/1000, minQuota), cpuPeriod))
	}
	if n := spec.Resources.MemoryBytes; n > 0 {
		opts = append(opts, oci.WithMemoryLimit(uint64(n)))
	}
	if n := spec.PidsLimit(); n > 0 {
		opts = append(opts, oci.WithPidsLimit(n))
	}
	opts = append(opts,
		withUser(user),
		oci.WithMounts(mounts),
		// The files, the FIFOs and init come last: nothing is mounted over them.
		oci.WithMounts([]specs.Mount{
			{Destination: runtime.FilesDir, Type: "bind", Source: d.filesDir(spec.WorkspaceUID, id), Options: []string{"bind", "ro", "nosuid", "nodev", "noexec"}},
			{Destination: handshake.Dir, Type: "bind", Source: d.ioDir(spec.WorkspaceUID, id), Options: []string{"bind", "ro", "nosuid", "nodev", "noexec"}},
			{Destination: handshake.InitPath, Type: "bind", Source: d.initPath, Options: []string{"bind", "ro", "nosuid", "nodev"}},
		}),
	)
	if spec.API { // in handshake.Dir
		opts = append(opts, oci.WithMounts([]specs.Mount{
			{Destination: runtime.APIDir, Type: "bind", Source: d.cfg.APIDir, Options: []string{"bind", "ro", "nosuid", "nodev", "noexec"}},
		}))
	}
	return append(opts, profileOpts(spec.Profile)...)
}

// openFiles is the limit of open files: the one that services have, or this
// process's when that is lower, for raising it takes a capability.
func openFiles() *specs.POSIXRlimit {
	limit := &specs.POSIXRlimit{Type: "RLIMIT_NOFILE", Soft: softFiles, Hard: hardFiles}
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &own); err == nil {
		limit.Hard = min(limit.Hard, own.Max)
		limit.Soft = min(limit.Soft, limit.Hard)
	}
	return limit
}

// coreSize is the limit of core files: none, unless a container's program asks for
// them by raising its soft limit. Its environment is in its memory, and a core file
// would carry that out of it: onto the disk, in the snapshot, or to the machine's
// crash handler. To such a handler, which the kernel calls whatever the limit, 1 is
// "never" (core(5)); for a file it is too little. Given or not, it would otherwise be
// what containerd happens to have: often no limit.
func coreSize() *specs.POSIXRlimit {
	limit := &specs.POSIXRlimit{Type: "RLIMIT_CORE", Soft: 1, Hard: unix.RLIM_INFINITY}
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &own); err == nil {
		limit.Hard = min(limit.Hard, own.Max)
		limit.Soft = min(limit.Soft, limit.Hard)
	}
	return limit
}

// specVersion names the oldest version that has what we use: older runtimes
// refuse newer ones.
func specVersion(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
	s.Version = "1.0.2"
	return nil
}

func withUser(user specs.User) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		s.Process.User = user
		return nil
	}
}

func userFailure(name string, err error) error {
	e := &runtime.Error{Reason: runtime.ReasonUserNotFound, Permanent: true, Err: err}
	switch {
	case errors.Is(err, oci.ErrNoGroupsFound):
		e.Message = fmt.Sprintf("the image has no group of user %q", name)
	case errors.Is(err, oci.ErrNoUsersFound):
		e.Message = fmt.Sprintf("the image has no user %q", name)
	case errors.Is(err, fs.ErrNotExist):
		e.Message = fmt.Sprintf("user %q can't be looked up: the image has no /etc/passwd or /etc/group", name)
	case containsAny(err, "invalid USER value"):
		e.Message = fmt.Sprintf("user %q: want user[:group], by name or number", name)
	default:
		return err
	}
	return e
}

// mergeEnv lays later over earlier; of a key that comes twice the later value
// counts, at the place of the first.
func mergeEnv(earlier, later []string) []string {
	merged := make([]string, 0, len(earlier)+len(later)+1)
	index := make(map[string]int, cap(merged))
	for _, entry := range slices.Concat(earlier, later) {
		key, _, _ := strings.Cut(entry, "=")
		if i, ok := index[key]; ok {
			merged[i] = entry
			continue
		}
		index[key] = len(merged)
		merged = append(merged, entry)
	}
	if _, ok := index["PATH"]; !ok {
		merged = append(merged, "PATH="+defaultPath)
	}
	return merged
}

func lookupEnv(env []string, key string) string {
	for _, entry := range env {
		if v, ok := strings.CutPrefix(entry, key+"="); ok {
			return v
		}
	}
	return ""
}

// Limits of execve: one string with its NUL, and all of arguments and
// environment with a pointer each, at the usual stack limit of 8 MiB.
const (
	maxString = 128 << 10
	maxTotal  = 2 << 20
	// maxPaths keeps a go-ahead below handshake.MaxGoAhead, whatever the rest is.
	maxPaths = 1 << 20
)

// checkEnv refuses what execve would: the old instance is gone by then.
func checkEnv(env, argv []string) error {
	for _, entry := range env {
		key, _, ok := strings.Cut(entry, "=")
		switch {
		case !ok || key == "":
			return &runtime.Error{Reason: runtime.ReasonExecFailed, Message: "an environment entry is not KEY=value", Permanent: true}
		case strings.ContainsRune(entry, 0):
			return &runtime.Error{Reason: runtime.ReasonExecFailed, Message: fmt.Sprintf("environment variable %q holds a NUL byte", strings.ToValidUTF8(key, "?")), Permanent: true}
		case len(entry)+1 > maxString:
			return &runtime.Error{Reason: runtime.ReasonEnvironmentTooLarge, Permanent: true,
				Message: fmt.Sprintf("environment variable %q takes %d bytes; the kernel takes less than %d", key, len(entry)+1, maxString)}
		}
	}
	// Where to look for the command goes with the go-ahead, too.
	if n := stringBytes(handshake.Paths(argv[0], lookupEnv(env, "PATH"))); n > maxPaths {
		return &runtime.Error{Reason: runtime.ReasonEnvironmentTooLarge, Permanent: true,
			Message: fmt.Sprintf("the files that PATH names for the command take %d bytes, more than %d", n, maxPaths)}
	}
	return checkTotal(stringBytes(env) + stringBytes(argv))
}

// checkLaunch refuses, while the older instance runs, what checkEnv would refuse
// once the launch is known. Of a variable that the launch lays over the image's
// only one counts, as far as it is known which those are.
func checkLaunch(spec runtime.Spec, imageEnv, argv []string) error {
	own := slices.DeleteFunc(mergeEnv(imageEnv, nil), func(entry string) bool {
		key, _, _ := strings.Cut(entry, "=")
		return slices.ContainsFunc(spec.Env, func(e string) bool { return strings.HasPrefix(e, key+"=") })
	})
	return checkTotal(stringBytes(own) + spec.LaunchBytes + stringBytes(argv))
}

// stringBytes is what strings take of execve's limit.
func stringBytes(list []string) int {
	total := 0
	for _, s := range list {
		total += len(s) + 1 + 8
	}
	return total
}

func checkTotal(total int) error {
	if total <= maxTotal {
		return nil
	}
	return &runtime.Error{Reason: runtime.ReasonEnvironmentTooLarge, Permanent: true,
		Message: fmt.Sprintf("arguments and environment take %d bytes; the kernel takes %d", total, maxTotal)}
}
