package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

// load reads a configuration from a file with the given text (none if empty),
// an environment and flags.
func load(t *testing.T, text string, environ, args []string) (config, []string, error) {
	t.Helper()
	flags := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	addFlags(flags)
	if text != "" {
		path := filepath.Join(t.TempDir(), "workspaced.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config", path)
	}
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	return loadConfig(flags, environ)
}

func TestConfigPrecedence(t *testing.T) {
	for _, tt := range []struct {
		name    string
		file    string
		environ []string
		args    []string
		edit    func(*config)
	}{
		{name: "defaults", edit: func(*config) {}},
		{
			name: "file over defaults",
			file: "data_dir: /a\nstate_dir: /s\nmax_concurrent_cycles: 9\ndrain_timeout: 1m30s\nimport_images: [/x.tar, /y.tar]\ninsecure: true\nlisten:\n",
			edit: func(c *config) {
				c.DataDir, c.StateDir, c.Socket, c.MaxConcurrentCycles = "/a", "/s", "/s/workspaced.sock", 9
				c.DrainTimeout, c.ImportImages, c.Insecure = 90*time.Second, []string{"/x.tar", "/y.tar"}, true
			},
		},
		{
			name:    "environment over file",
			file:    "data_dir: /file\nlog_level: debug\n",
			environ: []string{"WORKSPACED_DATA_DIR=/env", "WORKSPACED_PLAIN_HTTP_REGISTRIES=a:5000, b", "WORKSPACED_MAX_CONCURRENT_CYCLES=7", "WORKSPACED_INSECURE=true", "WORKSPACED_DRAIN_TIMEOUT=5s", "OTHER=1"},
			edit: func(c *config) {
				c.DataDir, c.LogLevel, c.MaxConcurrentCycles, c.Insecure = "/env", "debug", 7, true
				c.PlainHTTPRegistries, c.DrainTimeout = []string{"a:5000", "b"}, 5*time.Second
			},
		},
		{
			name:    "flags over environment and file",
			file:    "data_dir: /file\nlog_format: json\nimport_images: [/x.tar]\n",
			environ: []string{"WORKSPACED_DATA_DIR=/env", "WORKSPACED_LOG_FORMAT=text", "WORKSPACED_IMPORT_IMAGES=/y.tar"},
			args:    []string{"--data-dir=/flag", "--log-format=json", "--import-images=/z.tar", "--drain-timeout=2s", "--listen=127.0.0.1:7070", "--insecure"},
			edit: func(c *config) {
				c.DataDir, c.LogFormat, c.ImportImages, c.DrainTimeout = "/flag", "json", []string{"/z.tar"}, 2*time.Second
				c.Listen, c.Insecure = "127.0.0.1:7070", true
			},
		},
		{
			name: "a flag at its default still wins",
			file: "max_concurrent_cycles: 9\n",
			args: []string{"--max-concurrent-cycles=4"},
			edit: func(*config) {},
		},
		{
			name: "host paths in their shortest form",
			args: []string{"--allowed-host-paths=/srv/shared/,/srv//x/../y"},
			edit: func(c *config) { c.AllowedHostPaths = []string{"/srv/shared", "/srv/y"} },
		},
		{
			name:    "keys",
			file:    "key_uri: env://FILE\nprevious_key_uri: file:///etc/key\n",
			environ: []string{"WORKSPACED_KEY_URI=hcvault://vault:8200/transit/keys/k"},
			args:    []string{"--previous-key-uri=credential://key"},
			edit: func(c *config) {
				c.KeyURI, c.PreviousKeyURI = "hcvault://vault:8200/transit/keys/k", "credential://key"
			},
		},
		{
			name: "sockets as addresses",
			args: []string{"--containerd=unix:///run/c.sock", "--socket=/x/y.sock", "--metrics-listen=unix:///x/m.sock"},
			edit: func(c *config) {
				c.Containerd, c.Socket, c.MetricsListen = "/run/c.sock", "/x/y.sock", "/x/m.sock"
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := defaultConfig()
			want.Socket = "/run/workspaced/workspaced.sock"
			tt.edit(&want)
			if want.KeyURI == "" {
				want.KeyURI = "file://" + want.DataDir + "/workspaced.key"
			}
			got, warnings, err := load(t, tt.file, tt.environ, tt.args)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if len(warnings) != 0 {
				t.Errorf("warnings: %v", warnings)
			}
		})
	}
}

func TestConfigRefused(t *testing.T) {
	for _, tt := range []struct {
		name    string
		file    string
		environ []string
		args    []string
		want    []string
	}{
		{name: "unknown key", file: "datadir: /x\n", want: []string{`unknown key "datadir"`, "data_dir"}},
		{name: "no yaml", file: "data_dir: [\n", want: []string{"configuration file"}},
		{name: "no such file", args: []string{"--config=/does/not/exist"}, want: []string{"/does/not/exist"}},
		{name: "no such file, environment", environ: []string{"WORKSPACED_CONFIG=/does/not/exist"}, want: []string{"/does/not/exist"}},
		{name: "bad duration", file: "drain_timeout: soon\n", want: []string{"drain_timeout", "soon", "from configuration file /", "workspaced.yaml"}},
		{name: "bad duration, environment", environ: []string{"WORKSPACED_DRAIN_TIMEOUT=banana"}, want: []string{"banana is no duration", "from environment variable WORKSPACED_DRAIN_TIMEOUT"}},
		{name: "bad duration, environment over file", file: "drain_timeout: soon\n", environ: []string{"WORKSPACED_DRAIN_TIMEOUT=banana"}, want: []string{"banana", "from environment variable WORKSPACED_DRAIN_TIMEOUT"}},
		{name: "bad truth value", environ: []string{"WORKSPACED_INSECURE=perhaps"}, want: []string{"insecure", "perhaps", "from environment variable WORKSPACED_INSECURE"}},
		{name: "bad value, environment", environ: []string{"WORKSPACED_LOG_LEVEL=loud"}, want: []string{"log_level", "loud", "from environment variable WORKSPACED_LOG_LEVEL"}},
		{name: "bad number, file", file: "max_concurrent_cycles: many\n", want: []string{"max_concurrent_cycles", "many", "from configuration file /"}},
		{name: "duration without unit", file: "drain_timeout: 30\n", want: []string{"drain_timeout", "30"}},
		{name: "bad number", environ: []string{"WORKSPACED_MAX_CONCURRENT_CYCLES=many"}, want: []string{"max_concurrent_cycles", "many", "from environment variable WORKSPACED_MAX_CONCURRENT_CYCLES"}},
		{name: "map for string", file: "data_dir: {a: b}\n", want: []string{"data_dir"}},
		{name: "no cycles", args: []string{"--max-concurrent-cycles=0"}, want: []string{"max_concurrent_cycles", "from flag --max-concurrent-cycles"}},
		{name: "no drain timeout", args: []string{"--drain-timeout=0s"}, want: []string{"drain_timeout"}},
		{name: "rate", args: []string{"--rate-limit=-1"}, want: []string{"rate_limit", "-1"}},
		{name: "rate of no RPC", args: []string{"--method-rate-limits=SetSecrets=1"}, want: []string{"method_rate_limits", "SetSecrets"}},
		{name: "rate of an RPC", args: []string{"--method-rate-limits=SetSecret"}, want: []string{"method_rate_limits", "METHOD=CALLS"}},
		{name: "audit age", args: []string{"--audit-max-age=-1s"}, want: []string{"audit_max_age"}},
		{name: "no versions", args: []string{"--secret-versions=0"}, want: []string{"secret_versions", "0 is not between 1 and 100", "from flag --secret-versions"}},
		{name: "too many versions", file: "secret_versions: 101\n", want: []string{"secret_versions", "101 is not between 1 and 100"}},
		{name: "no audit log", args: []string{"--audit-max-mib=0"}, want: []string{"audit_max_mib", "4096"}},
		{name: "log level", args: []string{"--log-level=loud"}, want: []string{"log_level", "loud"}},
		{name: "log format", args: []string{"--log-format=xml"}, want: []string{"log_format", "xml"}},
		{name: "key's kind", args: []string{"--key-uri=/etc/key"}, want: []string{"key_uri: is none of file:///PATH, env://NAME", "from flag --key-uri"}},
		{name: "previous key's form", file: "previous_key_uri: hcvault://v:1/transit\n", want: []string{"previous_key_uri: is no hcvault://HOST:PORT/MOUNT/keys/KEY", "from configuration file"}},
		{name: "the same key twice", file: "key_uri: env://A\nprevious_key_uri: env://A\n", want: []string{"previous_key_uri: is the same as key_uri"}},
		{name: "previous key is the default", args: []string{"--previous-key-uri=file:///var/lib/workspaced/workspaced.key"}, want: []string{"the same as key_uri"}},
		{name: "empty data dir", args: []string{"--data-dir="}, want: []string{"data_dir"}},
		{name: "listen without insecure", args: []string{"--listen=127.0.0.1:1"}, want: []string{"--insecure"}},
		{name: "listen everywhere", args: []string{"--listen=:1", "--insecure"}, want: []string{"loopback"}},
		{name: "listen on another address", args: []string{"--listen=192.0.2.1:1", "--insecure"}, want: []string{"loopback"}},
		{name: "listen on a name", args: []string{"--listen=example.com:1", "--insecure"}, want: []string{"loopback"}},
		{name: "listen without port", args: []string{"--listen=localhost", "--insecure"}, want: []string{"host:port"}},
		{name: "TLS without key", args: []string{"--listen=:1", "--tls-cert-file=/c", "--tls-client-ca-file=/a"}, want: []string{"tls_key_file", "is missing"}},
		{name: "TLS without authorities", args: []string{"--listen=:1", "--tls-cert-file=/c", "--tls-key-file=/k"}, want: []string{"tls_client_ca_file", "is missing"}},
		{name: "TLS without listen", args: []string{"--tls-cert-file=/c", "--tls-key-file=/k", "--tls-client-ca-file=/a"}, want: []string{"tls_cert_file", "listen is not set"}},
		{name: "TLS and plain text", args: []string{"--listen=:1", "--insecure", "--tls-cert-file=/c", "--tls-key-file=/k", "--tls-client-ca-file=/a"}, want: []string{"insecure", "one or the other"}},
		{name: "health", args: []string{"--health=perhaps"}, want: []string{"health", "perhaps", "public, authenticated, off", "from flag --health"}},
		{name: "reflection", file: "reflection: all\n", want: []string{"reflection", "all", "from configuration file"}},
		{name: "metrics everywhere", args: []string{"--metrics-listen=:9"}, want: []string{"metrics_listen", "loopback", "from flag --metrics-listen"}},
		{name: "metrics on another address", args: []string{"--metrics-listen=192.0.2.1:9", "--insecure"}, want: []string{"metrics_listen", "loopback"}},
		{name: "metrics on a relative path", args: []string{"--metrics-listen=m.sock"}, want: []string{"metrics_listen", "absolute path"}},
		{name: "metrics on the API's socket", args: []string{"--metrics-listen=/s/a", "--socket=/s/a"}, want: []string{"metrics_listen", "/s/a"}},
		{name: "metrics on a socket too long", args: []string{"--metrics-listen=/" + strings.Repeat("x", 120)}, want: []string{"metrics_listen", "107"}},
		{name: "socket too long", args: []string{"--state-dir=/" + strings.Repeat("x", 120)}, want: []string{"socket", "107"}},
		{name: "relative host path", args: []string{"--allowed-host-paths=/srv,srv/shared"}, want: []string{"allowed_host_paths", `"srv/shared"`, "not absolute", "from flag --allowed-host-paths"}},
		{name: "two containerds", args: []string{"--containerd=/x", "--private-containerd"}, want: []string{"private_containerd"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := load(t, tt.file, tt.environ, tt.args)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not say %q", err, want)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("error has more than one line: %q", err)
			}
		})
	}
}

func TestConfigWarnsOfUnknownEnvironment(t *testing.T) {
	_, warnings, err := load(t, "", []string{"WORKSPACED_DATADIR=/x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "WORKSPACED_DATADIR") {
		t.Errorf("warnings %v", warnings)
	}
}

// What --print-config prints is a file that brings the same about.
func TestConfigYAMLRoundTrip(t *testing.T) {
	want, _, err := load(t, "", nil, []string{"--drain-timeout=90s", "--import-images=/a.tar,/b.tar", "--listen=[::1]:9", "--insecure", "--metrics-listen=localhost:8"})
	if err != nil {
		t.Fatal(err)
	}
	text, err := want.yaml()
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := load(t, string(text), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s\n%s", diff, text)
	}
}
