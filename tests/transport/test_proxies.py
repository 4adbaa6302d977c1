"""Which proxy a URL is asked through: settings, environment, bypass lists."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bits_async.errors import BitsError, ErrorCode, ErrorContext, InvalidArgument, NetworkError
from bits_async.transport.proxies import MAX_LIST, ProxySettings, ProxyUsage, resolve, route


def preconfig(**variables: str) -> ProxySettings:
    return resolve(ProxySettings.preconfig(), variables)


# -- settings as arguments


def test_usage_has_the_numbers_of_bits() -> None:
    assert [(usage.name, usage.value) for usage in ProxyUsage] == [
        ("PRECONFIG", 0),
        ("NO_PROXY", 1),
        ("OVERRIDE", 2),
        ("AUTODETECT", 3),
    ]


@pytest.mark.parametrize(
    ("settings", "usage"),
    [
        (ProxySettings.preconfig(), ProxyUsage.PRECONFIG),
        (ProxySettings.no_proxy(), ProxyUsage.NO_PROXY),
        (ProxySettings.autodetect(), ProxyUsage.AUTODETECT),
        (ProxySettings.override("proxy"), ProxyUsage.OVERRIDE),
        (ProxySettings.of(None), ProxyUsage.PRECONFIG),
        (ProxySettings.of("http://proxy:3128"), ProxyUsage.OVERRIDE),
        (ProxySettings.of(ProxySettings.no_proxy()), ProxyUsage.NO_PROXY),
    ],
)
def test_each_kind_of_settings_says_which_it_is(settings: ProxySettings, usage: ProxyUsage) -> None:
    assert settings.usage is usage
    assert hash(settings) == hash(settings)


@pytest.mark.parametrize(
    ("given_list", "kept"),
    [
        ("http://proxy:3128", ("http://proxy:3128",)),
        ("a:1 b:2;c:3\td:4", ("a:1", "b:2", "c:3", "d:4")),
        (["a:1", "b:2 c:3"], ("a:1", "b:2", "c:3")),
        (("a",), ("a",)),
    ],
)
def test_a_proxy_list_is_text_or_a_sequence(given_list: str | Sequence[str], kept: tuple[str, ...]) -> None:
    assert ProxySettings.override(given_list, "x y").proxy_list == kept
    assert ProxySettings.override(given_list, "x y").bypass == ("x", "y")


@pytest.mark.parametrize(
    "entry",
    [
        "",
        " ",
        "socks5://proxy:1080",
        "ftp=proxy",
        "socks=proxy:1080",
        "http://",
        "http=",
        "http://proxy/path",
        "http://proxy?x",
        "http://proxy:port",
        "http://proxy:0",
        "http://proxy:70000",
        "http://proxy\\evil",
        "pro*xy",
        "127.1:3128",
        "[::1",
        "http=http=proxy",
        "proxy:3128\x00",
    ],
)
def test_a_malformed_proxy_is_refused_at_once(entry: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ProxySettings.of(entry)
    assert caught.value.code == ErrorCode.E_INVALIDARG


@pytest.mark.parametrize("entry", ["http://user:secret@proxy:3128", "user@proxy", "https=http://user:se/cret@proxy", "http://@proxy"])
def test_user_information_in_an_argument_is_refused_and_not_repeated(entry: str) -> None:
    with pytest.raises(InvalidArgument, match="set_credentials") as caught:
        ProxySettings.override([entry])
    assert "secret" not in str(caught.value)
    assert "cret" not in str(caught.value).replace("credentials", "")


@pytest.mark.parametrize("entry", ["foo*", "10.*", "a.*.example", "http://host", "host/path", "user@host", "[::1", "a b@"])
def test_a_malformed_bypass_entry_is_refused_at_once(entry: str) -> None:
    with pytest.raises(InvalidArgument, match="bypass"):
        ProxySettings.override("proxy", [entry])


@pytest.mark.parametrize("value", [5, b"proxy", ["proxy"]])
def test_a_proxy_argument_is_settings_text_or_none(value: Any) -> None:
    with pytest.raises(InvalidArgument):
        ProxySettings.of(value)


@pytest.mark.parametrize(
    "wrong",
    [
        ("override",),
        (ProxyUsage.OVERRIDE,),
        (ProxyUsage.OVERRIDE, "http://proxy"),
        (ProxyUsage.OVERRIDE, ["proxy"]),
        (ProxyUsage.OVERRIDE, (5,)),
    ],
)
def test_settings_that_name_no_way_are_refused_and_never_a_direct_connection(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidArgument):
        ProxySettings(*wrong)


def test_a_list_holds_text_only() -> None:
    with pytest.raises(InvalidArgument):
        ProxySettings.override([5])  # type: ignore[list-item]


def test_lists_have_at_most_32_kib() -> None:
    longest = ["h" * 31] * 1024  # with the spaces between 32 KiB less one
    assert len(ProxySettings.override("p", longest).bypass) == 1024
    with pytest.raises(InvalidArgument) as caught:
        ProxySettings.override("p", [*longest, "hh"])
    assert caught.value.code == ErrorCode.BG_E_PROXY_BYPASS_LIST_TOO_LARGE
    with pytest.raises(InvalidArgument) as caught:
        ProxySettings.override("p " * (MAX_LIST // 2 + 1))
    assert caught.value.code == ErrorCode.BG_E_PROXY_LIST_TOO_LARGE


# -- the route


@pytest.mark.parametrize(
    ("proxies", "url", "proxy"),
    [
        ("proxy", "http://h/", "http://proxy:80"),
        ("proxy:3128", "http://h/", "http://proxy:3128"),
        ("proxy:3128", "https://h/", "http://proxy:3128"),
        ("http://proxy:3128/", "https://h/", "http://proxy:3128"),
        ("https://proxy", "http://h/", "https://proxy:443"),
        ("HTTPS://Proxy.Example:8443", "https://h/", "https://proxy.example:8443"),
        ("http://[::1]:3128", "http://h/", "http://[::1]:3128"),
        ("b\u00fccher.example:1", "http://h/", "http://xn--bcher-kva.example:1"),
        ("http=a:1 https=b:2", "http://h/", "http://a:1"),
        ("http=a:1 https=b:2", "HTTPS://h/", "http://b:2"),
        ("https=https://b:2 c:3", "http://h/", "http://c:3"),
        ("https=b:2 c:3", "https://h/", "http://b:2"),
        ("c:3 https=b:2", "https://h/", "http://c:3"),
        ("http=a:1", "https://h/", None),
        ("proxy", "http://localhost/", "http://proxy:80"),
        ("proxy", "http://127.0.0.1:8080/", "http://proxy:80"),
        ("proxy", "http://[::1]/", "http://proxy:80"),
    ],
)
def test_the_first_proxy_that_fits_the_scheme_is_asked_for_loopback_too(proxies: str, url: str, proxy: str | None) -> None:
    assert route(ProxySettings.override(proxies), url) == proxy


def test_no_proxy_is_direct() -> None:
    assert route(ProxySettings.no_proxy(), "http://h/") is None


@pytest.mark.parametrize(
    "settings",
    [
        ProxySettings.autodetect(),
        ProxySettings.preconfig(),  # never read from the environment
        preconfig(http_proxy="socks5://proxy:1080"),
        preconfig(http_proxy="http://proxy:port"),
        preconfig(http_proxy="http://proxy/path?a=b"),
        preconfig(http_proxy="http://user:pass/word@proxy"),
        preconfig(http_proxy="://"),
        preconfig(http_proxy="a b"),
    ],
)
def test_settings_that_cannot_be_followed_are_an_error_and_never_a_direct_connection(settings: ProxySettings) -> None:
    with pytest.raises(NetworkError) as caught:
        route(settings, "http://h/?sig=secret")
    assert (caught.value.code, caught.value.context) == (ErrorCode.BG_E_INVALID_PROXY_INFO, ErrorContext.GENERAL_TRANSPORT)
    assert not caught.value.transient
    assert "secret" not in str(caught.value)
    assert "word" not in str(caught.value)


def test_a_broken_proxy_for_https_does_not_stop_http() -> None:
    settings = preconfig(https_proxy="socks5://proxy:1080", http_proxy="proxy:3128")
    assert route(settings, "http://h/") == "http://proxy:3128"
    with pytest.raises(BitsError):
        route(settings, "https://h/")


BOTH = [
    ("*", "http://anything/", True),
    ("*", "http://10.0.0.1/", True),
    ("*", "http://[::1]/", True),
    ("host.example", "http://host.example/", True),
    ("Host.Example", "http://HOST.example/", True),
    ("host.example", "http://host.example./", True),
    ("host.example.", "http://host.example/", True),
    ("host.example", "http://otherhost.example/", False),
    ("host.example", "http://host.example.evil/", False),
    (".example", "http://host.example/", True),
    (".example", "http://a.b.example/", True),
    (".example", "http://example/", True),
    (".example", "http://notexample/", False),
    ("*.example", "http://host.example/", True),
    ("*.example", "http://example/", False),
    ("*corp", "http://mycorp/", True),
    ("*corp", "http://corporate/", False),
    ("host:8080", "http://host:8080/", True),
    ("host:8080", "http://host/", False),
    ("host:80", "http://host/", True),
    ("host:443", "https://host/", True),
    (".example:8080", "http://a.example:8080/", True),
    (".example:8080", "http://a.example/", False),
    ("*.example:8080", "http://a.example:8080/", True),
    ("*.example:8080", "http://a.example:8081/", False),
    ("10.0.0.1", "http://10.0.0.1/", True),
    ("10.0.0.1", "http://10.0.0.11/", False),
    ("10.0.0.1", "http://x.10.0.0.1.example/", False),
    ("10.0.0.1:81", "http://10.0.0.1:81/", True),
    ("10.0.0.1:81", "http://10.0.0.1/", False),
    ("10.0.0.0/8", "http://10.9.8.7/", True),
    ("10.1.2.3/8", "http://10.9.8.7/", True),
    ("10.0.0.0/8", "http://11.0.0.1/", False),
    ("10.0.0.0/8", "http://ten.example/", False),
    ("10.0.0.1", "http://[::ffff:10.0.0.1]/", True),
    ("::ffff:10.0.0.0/104", "http://10.9.8.7/", True),
    ("::1", "http://[::1]/", True),
    ("[::1]", "http://[0:0::1]/", True),
    ("[::1]:8080", "http://[::1]:8080/", True),
    ("[::1]:8080", "http://[::1]/", False),
    ("fd00::/8", "http://[fd12::1]/", True),
    ("fd00::/8", "http://10.0.0.1/", False),
    ("127.0.0.0/8", "http://localhost/", False),
    ("b\u00fccher.example", "http://xn--bcher-kva.example/", True),
    ("<local>", "http://intranet/", True),
    ("<LOCAL>", "http://localhost/", True),
    ("<local>", "http://intranet.example/", False),
    ("<local>", "http://[::1]/", False),
    ("<local>", "http://10.0.0.1/", False),
]


@pytest.mark.parametrize(("entry", "url", "direct"), [*BOTH, ("example", "http://host.example/", False)])
def test_the_bypass_list_of_bits_names_the_hosts_to_ask_directly(entry: str, url: str, direct: bool) -> None:
    assert (route(ProxySettings.override("proxy", [entry]), url) is None) is direct


@pytest.mark.parametrize(
    ("entry", "url", "direct"),
    [
        *BOTH,
        ("example", "http://host.example/", True),  # a bare name stands for the names below it too
        ("example", "http://notexample/", False),
        ("example:8080", "http://host.example:8080/", True),
        ("foo*", "http://foobar/", False),  # what nobody understands is skipped
        ("[::1", "http://[::1]/", False),
        ("http://h", "http://h/", False),
    ],
)
def test_no_proxy_of_the_environment_names_the_hosts_to_ask_directly(entry: str, url: str, direct: bool) -> None:
    assert (route(preconfig(all_proxy="proxy", no_proxy=entry), url) is None) is direct


def test_any_entry_of_a_list_suffices() -> None:
    assert route(preconfig(http_proxy="proxy", no_proxy="a, b,c d"), "http://c/") is None
    assert route(preconfig(http_proxy="proxy", no_proxy="a, b,c d"), "http://d/") is None
    assert route(preconfig(http_proxy="proxy", no_proxy=",, ,"), "http://a/") == "http://proxy:80"


# -- the environment


@pytest.mark.parametrize(
    ("variables", "for_http", "for_https"),
    [
        ({}, None, None),
        ({"http_proxy": "http://p:1"}, "http://p:1", None),
        ({"https_proxy": "http://p:1"}, None, "http://p:1"),
        ({"HTTP_PROXY": "p:1", "HTTPS_PROXY": "p:2"}, "http://p:1", "http://p:2"),
        ({"http_proxy": "p:1", "HTTP_PROXY": "p:2"}, "http://p:1", None),
        ({"http_proxy": "", "HTTP_PROXY": "p:2", "ALL_PROXY": "p:3"}, None, "http://p:3"),
        ({"all_proxy": "p:1"}, "http://p:1", "http://p:1"),
        ({"ALL_PROXY": "p:1", "https_proxy": "p:2"}, "http://p:1", "http://p:2"),
        ({"all_proxy": "", "ALL_PROXY": "p:1"}, None, None),
        ({"http_proxy": "  p:1\n"}, "http://p:1", None),
        # httpoxy: in a CGI program HTTP_PROXY is the caller's Proxy header
        ({"REQUEST_METHOD": "GET", "HTTP_PROXY": "evil:1"}, None, None),
        ({"REQUEST_METHOD": "GET", "HTTP_PROXY": "evil:1", "http_proxy": "p:1"}, "http://p:1", None),
        ({"REQUEST_METHOD": "GET", "HTTP_PROXY": "evil:1", "ALL_PROXY": "p:1"}, "http://p:1", "http://p:1"),
        ({"Http_Proxy": "p:1"}, None, None),
    ],
)
def test_preconfig_is_the_environment_of_the_creating_process(
    variables: dict[str, str], for_http: str | None, for_https: str | None
) -> None:
    settings = resolve(ProxySettings.preconfig(), variables)
    assert settings.usage is ProxyUsage.PRECONFIG
    assert (route(settings, "http://h/"), route(settings, "https://h/")) == (for_http, for_https)


@pytest.mark.parametrize(
    ("variables", "direct"),
    [({"no_proxy": "h", "NO_PROXY": "x"}, True), ({"no_proxy": "", "NO_PROXY": "h"}, False), ({"NO_PROXY": "h"}, True)],
)
def test_no_proxy_in_lower_case_wins(variables: dict[str, str], direct: bool) -> None:
    assert (route(preconfig(http_proxy="p", **variables), "http://h/") is None) is direct


@pytest.mark.parametrize(
    ("value", "proxy"),
    [
        ("http://user:secret@proxy:3128", "http://proxy:3128"),
        ("user:secret@proxy:3128", "http://proxy:3128"),
        ("http://user:sec@ret@proxy:3128/", "http://proxy:3128"),
        ("https://user@proxy", "https://proxy:443"),
        ("http://@proxy:3128", "http://proxy:3128"),
        ("http://user:secret%40x@[::1]:3128", "http://[::1]:3128"),
    ],
)
def test_credentials_in_the_environment_are_dropped(value: str, proxy: str) -> None:
    settings = preconfig(http_proxy=value)
    assert route(settings, "http://h/") == proxy
    assert "sec" not in repr(settings)
    assert "user" not in repr(settings)


@given(st.sampled_from(["http://", "https://", "socks5://", ""]), st.text(st.sampled_from("secret:/@?#\\%.x "), max_size=20))
def test_no_password_of_the_environment_survives_whatever_it_looks_like(scheme: str, noise: str) -> None:
    settings = preconfig(http_proxy=f"{scheme}{noise}PASSWORD{noise}@proxy:3128", https_proxy=f"{scheme}user:PASSWORD@{noise}@proxy")
    assert "PASSWORD" not in repr(settings)


def test_the_environment_is_read_once() -> None:
    settings = preconfig(http_proxy="p:1")
    assert resolve(settings, {"http_proxy": "other:2"}) is settings


@pytest.mark.parametrize("settings", [ProxySettings.no_proxy(), ProxySettings.autodetect(), ProxySettings.override("p")])
def test_explicit_settings_ignore_the_environment(settings: ProxySettings) -> None:
    assert resolve(settings, {"http_proxy": "other:2", "no_proxy": "*"}) is settings


def test_too_large_a_variable_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        preconfig(no_proxy="h," * MAX_LIST)
    assert caught.value.code == ErrorCode.BG_E_PROXY_BYPASS_LIST_TOO_LARGE
    with pytest.raises(InvalidArgument) as caught:
        preconfig(http_proxy="h" * MAX_LIST)
    assert caught.value.code == ErrorCode.BG_E_PROXY_LIST_TOO_LARGE
