// Workspaced is the daemon: it keeps workspaces, restarts their containers when
// what they see changes, and serves workspace.v1.WorkspaceControl.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	goruntime "runtime"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// version is set by the linker.
var version = "unknown"

// stdio is what a run reads and writes.
type stdio struct {
	out, err io.Writer
	environ  []string
}

func main() {
	// containerd inherits it and makes directories that containers' users have to
	// pass. What is private is made so, one by one.
	unix.Umask(0o022)
	err := run(context.Background(), os.Args[1:], stdio{out: os.Stdout, err: os.Stderr, environ: os.Environ()})
	if err != nil {
		fmt.Fprintln(os.Stderr, "workspaced:", err)
		os.Exit(1)
	}
}

// run is the program: it returns nil after success, or what to tell the user in
// one sentence. The end of ctx asks a daemon to drain, like SIGTERM.
func run(ctx context.Context, args []string, std stdio) error {
	root := &cobra.Command{
		Use:           "workspaced",
		Short:         "Keeps containers in step with their secrets and settings",
		Version:       fmt.Sprintf("%s %s %s/%s", version, goruntime.Version(), goruntime.GOOS, goruntime.GOARCH),
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetArgs(args)
	root.SetOut(std.out)
	root.SetErr(std.err)
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(serveCommand(std), purgeCommand(std), &cobra.Command{
		Use:   "generate-key",
		Short: "Print a new key, for key_uri's env:// and credential://",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return generateKey(std.out) },
	}, &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(std.out, "%s %s\n", root.Name(), root.Version)
			return err
		},
	})
	return root.ExecuteContext(ctx)
}

func serveCommand(std stdio) *cobra.Command {
	var printConfig bool
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon",
		Long: `Run the daemon until SIGTERM or SIGINT, which drains it: calls and cycles in
flight have --drain-timeout to finish, containers go on running. A second signal
ends it at once.

Each setting has one name: data_dir in the configuration file, WORKSPACED_DATA_DIR
in the environment, --data-dir as a flag. Flags win over the environment, that
over the file, that over the defaults.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, log, err := configure(cmd, std)
			if err != nil {
				return err
			}
			if printConfig {
				text, err := cfg.yaml()
				if err != nil {
					return err
				}
				_, err = std.out.Write(text)
				return err
			}
			return serve(cmd.Context(), cfg, log)
		},
	}
	addFlags(cmd.Flags())
	cmd.Flags().BoolVar(&printConfig, "print-config", false, "print the configuration that would be in force, and end")
	return cmd
}

func purgeCommand(std stdio) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "purge",
		Short: "Remove everything that this instance made",
		Long: `Remove everything that the daemon with this configuration made on this machine:
its containers, volumes, logs, database, key, and its private containerd with all
images. The daemon must not run. Images in a containerd that is not private stay:
others may use them.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, log, err := configure(cmd, std)
			if err != nil {
				return err
			}
			if !yes {
				return fmt.Errorf("nothing was removed: this would remove every workspace, secret and volume in %s, and %s: say --yes if that is meant", cfg.DataDir, cfg.StateDir)
			}
			return purge(cmd.Context(), cfg, log, std.out)
		},
	}
	addFlags(cmd.Flags())
	hideFlags(cmd.Flags(), purgeKeys)
	cmd.Flags().BoolVar(&yes, "yes", false, "really remove it")
	return cmd
}

// purgeKeys are the settings that purge makes use of.
var purgeKeys = []string{
	"data_dir", "state_dir", "socket", "socket_group", "metrics_listen", "init_path", "containerd", "private_containerd",
	"containerd_namespace", "containerd_binary", "runtime_binary", "log_level", "log_format",
}

// configure reads the configuration and makes the log that it asks for.
func configure(cmd *cobra.Command, std stdio) (config, *slog.Logger, error) {
	cfg, warnings, err := loadConfig(cmd.Flags(), std.environ)
	if err != nil {
		return config{}, nil, err
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
		return config{}, nil, err
	}
	options := &slog.HandlerOptions{Level: level}
	var handler slog.Handler = slog.NewTextHandler(std.err, options)
	if cfg.LogFormat == "json" {
		handler = slog.NewJSONHandler(std.err, options)
	}
	log := slog.New(handler)
	for _, w := range warnings {
		log.Warn(w)
	}
	return cfg, log, nil
}

var errRoot = errors.New("must run as root: containers, mounts and cgroups need it")
