// Bench measures workspaced beside its physical floors and its rivals, on real
// containers and a real disk, and prints each figure with its ratio.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
	"github.com/workspaced/workspaced/cmd/bench/internal/rows"
)

func main() {
	rows.BareServer()
	unix.Umask(0o022)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	what         []string
	json, report string
	command      string
}

func run(ctx context.Context, args []string, out io.Writer) error {
	var o options
	cmd := &cobra.Command{
		Use:           "bench",
		Short:         "Measure workspaced beside its floors and rivals",
		Long:          "Measure workspaced beside its floors and rivals.\n\n" + list(rows.All),
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return bench(cmd.Context(), rows.All, o, out) },
	}
	cmd.SetArgs(args)
	cmd.SetOut(out)
	cmd.CompletionOptions.DisableDefaultCmd = true
	cmd.Flags().StringSliceVar(&o.what, "what", nil, "the rows to run; all when it is not given")
	cmd.Flags().StringVar(&o.json, "json", "", "write the results to this file")
	cmd.Flags().StringVar(&o.report, "report", "", "write a report in Markdown to this file")
	cmd.Flags().StringVar(&o.command, "command", "make bench", "what the report says that it was made with")
	return cmd.ExecuteContext(ctx)
}

func list(all []rows.Row) string {
	var b strings.Builder
	for _, r := range all {
		fmt.Fprintf(&b, "  %-12s %s\n", r.Name, r.What)
	}
	return b.String()
}

// choose returns the rows of these names, all of them for none.
func choose(all []rows.Row, names []string) ([]rows.Row, error) {
	if len(names) == 0 {
		return all, nil
	}
	var chosen []rows.Row
	for _, name := range names {
		i := slices.IndexFunc(all, func(r rows.Row) bool { return r.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no row %q; there are\n%s", name, list(all))
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}

// bench runs the rows. That a goal is missed is a result and no error: a machine
// that is busy misses many. What can't be measured is.
func bench(ctx context.Context, all []rows.Row, o options, out io.Writer) (err error) {
	chosen, err := choose(all, o.what)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("must run as root: containers, mounts and cgroups need it")
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	env := &rows.Env{BinDir: filepath.Dir(exe), Dir: dir, Log: out}

	results := []measure.Result{}
	var failed []error
	for _, row := range chosen {
		fmt.Fprintf(out, "%s: %s\n", row.Name, row.What)
		rowCtx, cancel := context.WithTimeout(ctx, row.Limit)
		got, err := row.Run(rowCtx, env)
		cancel()
		for _, r := range got {
			fmt.Fprintln(out, "  "+line(r))
		}
		results = append(results, got...)
		if err != nil {
			fmt.Fprintln(out, "  FAILED:", err)
			failed = append(failed, fmt.Errorf("%s: %w", row.Name, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	if o.json != "" {
		failed = append(failed, writeJSON(o.json, results))
	}
	if err := errors.Join(failed...); err != nil {
		return err // a report with gaps would replace one without
	}
	if o.report != "" {
		return writeReport(o.report, o.command, results)
	}
	return nil
}
